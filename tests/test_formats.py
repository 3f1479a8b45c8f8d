"""Files that version 0.1.0 wrote load for ever: a model, a state, a run, a token cache, measurements."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import subquad
from subquad import cli
from subquad.compare.results import load as load_measurements
from subquad.train import corpus
from subquad.train.progress import read_metrics

WRITTEN = Path(__file__).with_name("formats") / "0.1.0"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A copy to work in."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model(written):
    expected = load_file("expected.safetensors")
    with torch.no_grad():
        logits, _ = subquad.load("run/model")(expected["tokens"])
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)


def test_a_state(written, capsys):
    assert cli.infer(["--model", "run/model", "--load-state", "later.state", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == "hat is read "


def test_a_run(written, monkeypatch):
    monkeypatch.setattr(corpus, "_write", lambda *_: pytest.fail("the tokens of version 0.1.0 were not taken"))
    before = read_metrics(Path("run"), 60)
    assert cli.main(["train", "fit", "--run", "run", "--trainer.max_steps", "64", "--resume"]) == 0
    after = read_metrics(Path("run"), 64)
    assert len(before) == 4
    assert after[: len(before)] == before
    assert float(after[-1]["val/bpb"]) == pytest.approx(0.834, abs=0.002)
    assert [path.name for path in sorted(Path("run/checkpoints").iterdir())][-1] == "step-00000064.ckpt"


def test_measurements(written):
    measured = load_measurements(Path("measurements.json"))
    assert {point.phase for point in measured.points} == {"train", "prefill", "decode"}
