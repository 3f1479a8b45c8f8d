"""`subquad train` from the command line: what a run leaves behind, stops and resumes, and what it refuses."""

import csv
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from subquad.cli import main as subquad
from subquad.errors import UserError
from subquad.models import checkpoint
from subquad.models.config import LMConfig
from subquad.models.tokenizer import load_tokenizer
from subquad.train.checkpoints import AtomicCheckpointIO, newest
from subquad.train.cli import main
from subquad.train.progress import draw_curve, read_metrics
from subquad.train.task import LanguageModeling


def fit(config, run, *more):
    return main(["fit", "--config", str(config), "--run", str(run), *more])


def losses(run):
    """Step -> training loss as it was logged, to the last digit."""
    with open(run / "metrics" / "metrics.csv", newline="", encoding="utf-8") as file:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


def weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def at_step(monkeypatch):
    """Run an action in the middle of step n, between the gradients and the update."""

    def register(step, action):
        def hook(self, optimizer):
            if self.global_step == step - 1:
                action()

        monkeypatch.setattr(LanguageModeling, "on_before_optimizer_step", hook)

    return register


def test_what_a_run_leaves(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert fit(config, run) == 0
    assert {p.name for p in run.iterdir()} == {
        "config.yaml",
        "curve.png",
        "metrics",
        "tensorboard",
        "checkpoints",
        "model",
    }
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000012.ckpt"]
    out, err = capsys.readouterr()
    assert "bits per byte (gzip -9 of the same text: " in out and f"{run}/model" in out
    assert "Tip" not in err and "Warning" not in err and "GPU" not in err

    rows = read_metrics(run)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "val/bpb" in row] == [5, 10, 12]
    assert all({"lr", "train/bpb", "tokens_per_second"} <= row.keys() for row in rows if "train/loss" in row)

    model = checkpoint.load(run / "model")
    assert model.config == LMConfig.from_file(run / "config.yaml"), "config.yaml is a model's configuration too"
    assert main(["validate", "--run", str(run)]) == 0
    assert f"{[row['val/bpb'] for row in rows if 'val/bpb' in row][-1]:.4f} bits per byte" in capsys.readouterr().out


def test_print_config_is_a_config(config, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(config), "--model.lr", "0.125", "--print_config"])
    values = yaml.safe_load(capsys.readouterr().out)
    assert end.value.code == 0
    assert values["model"]["lr"] == 0.125 and values["data"]["context"] == 48


KILL_AT_STEP = """
import os, signal, sys
from subquad.train.task import LanguageModeling
from subquad.train.cli import main

def hook(self, optimizer):
    if self.global_step == int(sys.argv[1]) - 1:
        os.kill(os.getpid(), signal.SIGKILL)

LanguageModeling.on_before_optimizer_step = hook
main(sys.argv[2:])
"""


def test_killed_and_resumed_is_unbroken(config, tmp_path):
    """SIGKILL in the middle of a random step; the epochs are 16 steps long, so some of them lie in the second."""
    step = random.randint(5, 29)
    options = ["--trainer.max_steps", "30", "--checkpoint_every", "4", "--trainer.val_check_interval", "7"]
    arguments = ["fit", "--config", str(config), "--run", str(tmp_path / "killed"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILL_AT_STEP, str(step), *arguments], cwd=tmp_path, env=environment)
    assert killed.returncode == -signal.SIGKILL
    saved = (step - 1) // 4 * 4
    assert newest(tmp_path / "killed" / "checkpoints").name == f"step-{saved:08d}.ckpt"

    assert fit(config, tmp_path / "unbroken", *options) == 0
    assert main(["fit", "--run", str(tmp_path / "killed"), "--resume"]) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    assert weights(tmp_path / "killed") == weights(tmp_path / "unbroken")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_asked_to_stop_saves_and_says_where(config, tmp_path, at_step, capsys, number):
    at_step(7, lambda: os.kill(os.getpid(), number))
    assert fit(config, tmp_path / "stopped") == 130
    out = capsys.readouterr().out
    path = tmp_path / "stopped" / "checkpoints" / "step-00000007.ckpt"
    assert f"saved {path}" in out and f"subquad train fit --run_dir {tmp_path / 'stopped'} --resume" in out
    assert path.is_file() and not (tmp_path / "stopped" / "model").exists()

    at_step(0, None)
    assert main(["fit", "--run", str(tmp_path / "stopped"), "--resume"]) == 0
    assert fit(config, tmp_path / "unbroken") == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "unbroken")


def test_a_failure_saves_the_last_whole_step(config, tmp_path, at_step, capsys):
    at_step(8, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(config, tmp_path / "failed")
    path = tmp_path / "failed" / "checkpoints" / "step-00000007.ckpt"
    assert str(path) in capsys.readouterr().err
    at_step(0, None)
    assert main(["fit", "--run", str(tmp_path / "failed"), "--resume"]) == 0
    assert fit(config, tmp_path / "unbroken") == 0
    assert weights(tmp_path / "failed") == weights(tmp_path / "unbroken")


@pytest.mark.parametrize("options", [["--data.truncate", "24"], ["--trainer.accumulate_grad_batches", "2"]])
def test_resuming_is_exact_with(config, tmp_path, at_step, options):
    at_step(7, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert fit(config, tmp_path / "stopped", *options) == 130
    at_step(0, None)
    assert main(["fit", "--run", str(tmp_path / "stopped"), "--resume"]) == 0
    assert fit(config, tmp_path / "unbroken", *options) == 0
    assert weights(tmp_path / "stopped") == weights(tmp_path / "unbroken")


def test_resuming_at_an_epochs_end_is_exact(config, tmp_path):
    options = ["--trainer.max_epochs", "2", "--trainer.max_steps", "-1", "--checkpoint_every", "16"]
    run = tmp_path / "run"
    assert fit(config, run, *options) == 0
    first, last = sorted((run / "checkpoints").iterdir())
    assert (first.name, last.name) == ("step-00000016.ckpt", "step-00000032.ckpt"), "an epoch is 16 steps long"
    unbroken = weights(run)
    last.unlink()
    assert main(["fit", "--run", str(run), "--resume"]) == 0
    assert weights(run) == unbroken


def test_checkpointed_activations_change_nothing(config, tmp_path):
    assert fit(config, tmp_path / "kept") == 0
    assert fit(config, tmp_path / "recomputed", "--model.checkpoint_activations", "true") == 0
    assert losses(tmp_path / "kept") == losses(tmp_path / "recomputed")


def test_mixed_precision_trains(config, tmp_path):
    assert fit(config, tmp_path / "run", "--trainer.precision", "bf16-mixed") == 0
    found = [float(loss) for loss in losses(tmp_path / "run").values()]
    assert found[-1] < found[0] - 0.5
    saved = torch.load(newest(tmp_path / "run" / "checkpoints"), weights_only=True)
    assert {t.dtype for t in saved["state_dict"].values()} == {torch.float32}


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "step-1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(10)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_row_of_metrics_is_left_out(tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "metrics.csv").write_text(
        "step,train/bpb,val/bpb\n1,5.0,\n2,4.0,3.5\n3,4.", encoding="utf-8"
    )
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert read_metrics(tmp_path, last_step=1) == [{"step": 1, "train/bpb": 5.0}]
    assert draw_curve(tmp_path) == tmp_path / "curve.png"


BAD = {
    "no config file": (["--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml: No such file"),
    "misspelt option": (["--model.lm.d_modle", "5"], "'model.lm.d_modle'; did you mean 'model.lm.d_model'"),
    "misspelt trainer option": (["--trainer.max_stps", "5"], "did you mean 'trainer.max_steps'"),
    "wrong type": (["--model.lr", "fast"], "model.lr.*float.*fast"),
    "unknown layer": (
        ["--model.lm.blocks", "[{pattern: [{mixer: Mamba3}]}]"],
        "no layer 'Mamba3'; did you mean 'Mamba'",
    ),
    "heads": (["--model.lm.d_model", "15"], "n_heads 2 does not divide d_model 15"),
    "vocabulary": (["--model.lm.vocab_size", "100"], "vocab_size is 100.*256 tokens"),
    "tokenizer": (["--data.tokenizer", "nowhere"], "no tokenizer at nowhere"),
    "no files": (["--data.files", "nowhere/*.txt"], "no file matches 'nowhere/\\*.txt'"),
    "folder": (["--data.files", "/usr"], "/usr is a folder; give its files"),
    "context": (["--data.context", "0"], "data.context is 0"),
    "truncate": (["--data.truncate", "25"], "data.truncate is 25; it must divide"),
    "accelerator": (["--trainer.accelerator", "warp"], "trainer: .*warp"),
    "nothing to resume": (["--resume"], "no checkpoint in .* to resume from"),
    "both": (["--resume", "--overwrite"], "exclude each other"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_nothing_written(config, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments, expected = BAD[name]
    assert subquad(["train", "fit", "--config", str(config), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1
    assert re.search(expected, err), err
    assert sorted(tmp_path.rglob("*")) == before


def test_misspelt_keys_in_the_file(config, tmp_path, capsys):
    text = config.read_text(encoding="utf-8")
    for right, wrong in (("vocab_size", "vocab_sze"), ("warmup_steps", "warmup_stesp"), ("n_heads", "n_haeds")):
        config.write_text(text.replace(right, wrong), encoding="utf-8")
        assert subquad(["train", "fit", "--config", str(config)]) == 2
        err = capsys.readouterr().err
        assert wrong in err and right in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_kept(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert fit(config, run) == 0
    before = weights(run)
    assert subquad(["train", "fit", "--config", str(config), "--run", str(run)]) == 2
    assert "--resume" in capsys.readouterr().err and weights(run) == before
    assert (
        subquad(["train", "fit", "--config", str(config), "--run", str(run), "--overwrite", "--model.lr", "0.02"]) == 0
    )
    assert weights(run) != before
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert subquad(["train", "fit", "--config", str(config), "--run", str(foreign), "--overwrite"]) == 2
    assert "holds no run" in capsys.readouterr().err and (foreign / "thesis.txt").exists()


def test_no_space_is_one_sentence(config, tmp_path, capsys, monkeypatch):
    def full(path):
        if path.name.startswith(".step-"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("subquad.files._to_disk", full)
    assert subquad(["train", "fit", "--config", str(config)]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err == f"error: cannot write {tmp_path / 'run/checkpoints/step-00000012.ckpt'}: No space left on device"


def test_no_permission_is_one_sentence(config, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for run in (tmp_path / "file" / "run", Path("/proc/run")):
        assert subquad(["train", "fit", "--config", str(config), "--run", str(run)]) == 2
        assert f"cannot make the run folder {run}" in capsys.readouterr().err


def test_other_data_cannot_be_resumed(config, tmp_path, capsys):
    assert fit(config, tmp_path / "run") == 0
    more = ["--run", str(tmp_path / "run"), "--resume", "--trainer.max_steps", "20"]
    assert subquad(["train", "fit", *more, "--seed_everything", "1"]) == 2
    assert "the data changed: the checkpoint was trained with seed 0" in capsys.readouterr().err
    assert subquad(["train", "fit", *more]) == 0, "a finished run goes on when there is more to do"


def test_asked_twice_stops_at_once(config, tmp_path, at_step, capsys):
    at_step(7, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert fit(config, tmp_path / "run", "--checkpoint_every", "3") == 130
    assert "step-00000006.ckpt; go on with" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_limit_it_is_one_epoch(config, tmp_path):
    assert fit(config, tmp_path / "run", "--trainer.max_steps", "-1") == 0
    assert newest(tmp_path / "run" / "checkpoints").name == "step-00000016.ckpt"


def test_a_hugging_face_tokenizer_goes_with_the_model(config, tmp_path, word_tokenizer, capsys):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("one two three two one two\n" * 40, encoding="utf-8")
    (tmp_path / "b.txt").write_text("three two one\n" * 40, encoding="utf-8")
    options = [
        "--data.files",
        str(tmp_path / "*.txt"),
        "--data.tokenizer",
        str(word_tokenizer),
        "--model.lm.vocab_size",
    ]
    assert subquad(["train", "fit", "--config", str(config), *options, "4"]) == 2
    assert "vocab_size is 4" in capsys.readouterr().err
    assert fit(config, tmp_path / "run", *options, "8") == 0
    tokenizer = load_tokenizer(tmp_path / "run" / "model")
    assert tokenizer.encode("one two") == [2, 3] and tokenizer.eos_id == 1
    rows = read_metrics(tmp_path / "run")
    last = [row for row in rows if "val/bpb" in row][-1]
    n_bytes, n_tokens = 8 * (26 + 14), 8 * (6 + 3) + 2  # the last 8 lines of each file, and their ends
    assert last["val/bpb"] == pytest.approx(last["val/loss"] / math.log(2) * n_tokens / n_bytes)
