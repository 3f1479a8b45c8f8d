"""Every command and every snippet of the README runs, in its order, in one folder."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from subquad import cli, configs
from subquad.errors import UserError
from subquad.layers import available
from subquad.models.lm import LM

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PROGRAMS = {"subquad": cli.main, "infer": cli.infer}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(configs.folder())
    (folder / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    return folder


def test_commands_and_snippets(folder, monkeypatch):
    """In the order of the page: later ones use what earlier ones made."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for kind, text in BLOCKS:
        if kind == "python":
            torch.manual_seed(0)
            exec(compile(text, "README.md", "exec"), {"__name__": "readme"})
        elif kind == "yaml":
            model = LM.from_config(yaml.safe_load(text))
            assert model(torch.zeros(1, 5, dtype=torch.long))[0].shape == (1, 5, 256)
        else:
            assert kind == "bash", f"the README has a block of kind {kind!r} that nothing runs"
            for line in text.replace("\\\n", " ").splitlines():
                run(line)


def run(line):
    words = shlex.split(line, comments=True)
    if line.endswith("# needs an NVIDIA GPU") and not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs an NVIDIA GPU"):
            cli._dispatch(words[1:])
        return
    if not words:
        return
    if words[0] == "make":  # what these do is the test run itself and the demo; here, that they are there
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "pip":
        assert words == ["pip", "install", "."]
    else:
        try:
            code = PROGRAMS[words[0]](words[1:])
        except SystemExit as end:  # --print_config ends the process
            code = end.code
        assert not code, line


def test_the_table_names_every_layer_with_its_card():
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, flags=re.MULTILINE))
    assert list(table) == list(available()), "the README's table of layers is out of step with subquad.layers"
    for name, layer in available().items():
        cells = [cell.strip() for cell in table[name].split("|")]
        card = layer.card
        assert cells[:5] == [card.op, card.train, card.decode, card.state, card.paper], name


def test_files_the_readme_names_exist():
    for path in re.findall(r"`(configs/[\w./]+\.yaml)`", README):
        assert (ROOT / path).is_file(), path
