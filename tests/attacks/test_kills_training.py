"""Training that is killed at any moment: nothing that was saved is lost, and what goes on from it ends bit-equal."""

import os
import random
import signal
import time

import pytest
import yaml

from subquad import cli
from subquad.train.checkpoints import is_whole

STEPS = 20


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run of some seconds, with dropout's and data's randomness and truncated backpropagation."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("".join(draw.choices("abcde \n", k=600)))
    blocks = [{"pattern": [{"mixer": {"name": "LinearAttention", "n_heads": 2}, "ffn": {"name": "SwiGLU"}}]}]
    values = {
        "model": {"lm": {"d_model": 16, "blocks": blocks}, "warmup_steps": 3},
        "data": {"files": "*.txt", "context": 96, "batch_tokens": 96, "truncate": 24, "cache": "cache"},
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "log_every_n_steps": 1, "val_check_interval": 7},
        "checkpoint_every": 2,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def fit(*arguments):
    return cli.main(["train", "fit", *arguments])


def killed(seconds, *arguments):
    """Exit code of a training in a fork, or None where it was killed before its end."""
    pid = os.fork()
    if not pid:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            os._exit(fit(*arguments))
        except BaseException:
            os._exit(99)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [10, 40])
def test_killed_training_goes_on_bit_equal(config, tmp_path, kills):
    began = time.monotonic()
    assert fit("--config", config, "--run_dir", "whole") == 0
    took = time.monotonic() - began
    draw, folder, steps = random.Random(kills), tmp_path / "run", 0
    for _ in range(kills):
        checkpoints = folder / "checkpoints"
        saved = {path.name: path.read_bytes() for path in checkpoints.glob("step-*.ckpt")}
        if saved:
            code = killed(draw.uniform(0, 1.2) * took, "--run_dir", "run", "--resume")
        else:
            code = killed(draw.uniform(0.3, 1.2) * took, "--config", config, "--run_dir", "run", "--overwrite")
        assert code in (None, 0)
        if folder.exists():
            assert (folder / "config.yaml").is_file()
        found = sorted(checkpoints.glob("step-*.ckpt"))
        assert all(is_whole(path) for path in found)
        if saved:  # of the two that are kept at least the newest, or newer ones, are there
            assert found and found[-1].name >= max(saved)
            steps = max(steps, int(found[-1].stem.removeprefix("step-")))
    if sorted((folder / "checkpoints").glob("step-*.ckpt")):
        assert fit("--run_dir", "run", "--resume") == 0
    else:
        assert fit("--config", config, "--run_dir", "run", "--overwrite") == 0
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    assert [path.name for path in tmp_path.rglob(".*")] == []
