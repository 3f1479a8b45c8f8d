"""The `subquad` command: dispatch, errors, and how fast it starts."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import subquad
from subquad import arguments, cli
from subquad.compare import cli as compare
from subquad.errors import UserError

SUBQUAD = Path(sys.executable).with_name("subquad")


def run(*arguments, **kwargs):
    return subprocess.run([SUBQUAD, *arguments], capture_output=True, text=True, timeout=120, **kwargs)


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_help_starts_without_torch(tmp_path):
    begin = time.perf_counter()
    script = "import sys; from subquad.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path).returncode == 0
    assert time.perf_counter() - begin < 2  # about 0.05 s; a torch import takes 2 s and more


def test_version():
    assert run("--version").stdout == f"subquad {subquad.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "subquad has no command 'trian'; did you mean 'train'?"),
        (["compare", "model"], "subquad compare has no command 'model'; did you mean 'models'?"),
    ],
)
def test_misspelt_command(words, said):
    done = run(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")


SUBCOMMANDS = [["train", "fit"], *(["compare", name] for name in compare.COMMANDS)]


@pytest.mark.parametrize("words", [*([name] for name in cli.COMMANDS), *SUBCOMMANDS], ids=" ".join)
def test_every_command_has_help(words, capsys):
    try:
        code = cli.main([*words, "--help"])
    except SystemExit as stopped:  # argparse's way
        code = stopped.code
    assert not code
    assert "usage" in capsys.readouterr().out.lower()


def test_the_alias_infer():
    assert cli.infer.__name__ == "infer"
    done = subprocess.run([SUBQUAD.with_name("infer"), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "--prompt" in done.stdout


def failing(error):
    def main(argv):
        raise error

    return SimpleNamespace(main=main)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(UserError("no such thing"), 2, "error: no such thing\n"), (KeyboardInterrupt(), 130, "")],
)
def test_errors_of_commands(monkeypatch, capsys, error, code, said):
    monkeypatch.setattr(arguments, "import_module", lambda name: failing(error))
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == said


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(arguments, "import_module", lambda name: failing(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main(["doctor"])


def test_a_reader_that_leaves_is_no_error():
    """`subquad --help | head -0`: the pipe is closed before anything is written."""
    process = subprocess.Popen([SUBQUAD, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_a_misspelt_option_names_the_nearest(capsys):
    assert cli.main(["doctor", "--halp"]) == 2
    assert capsys.readouterr().err == "error: subquad doctor has no option --halp; did you mean '--help'?\n"
