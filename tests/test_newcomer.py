"""A mixer in a file of one's own passes the contract, trains and decodes by its dotted path."""

import csv
import shutil
import sys
from pathlib import Path

import pytest

from subquad.cli import main
from subquad.layers.conformance import PROPERTIES

EXAMPLES = Path(__file__).parents[1] / "examples"
MIXER = "newcomer.LeakyAverage"


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path, monkeypatch):
    for name in ("newcomer.py", "newcomer.yaml"):
        shutil.copy(EXAMPLES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "newcomer", raising=False)
    yield
    sys.modules.pop("newcomer", None)


def test_it_keeps_the_contract(capsys):
    assert main(["conformance", MIXER, "--d-model", "24"]) == 0
    said = capsys.readouterr().out
    assert f"{MIXER}: {len(PROPERTIES)} of {len(PROPERTIES)} properties hold" in said


def test_it_trains_and_decodes(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    quick = ["--trainer.max_steps", "16", "--trainer.val_check_interval", "8", "--trainer.log_every_n_steps", "1"]
    settings = ["--data.files", "text.txt", "--data.cache", "cache", "--data.context", "64", *quick]
    assert main(["train", "fit", "--config", "newcomer.yaml", "--run", "run", *settings]) == 0
    with open("run/metrics/metrics.csv", newline="", encoding="utf-8") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 16
    assert losses[-1] < 0.8 * losses[0]
    capsys.readouterr()
    assert (
        main(["infer", "--model", "run/model", "--prompt", "the quick ", "--max-new-tokens", "12", "--trust-code"]) == 0
    )
    assert capsys.readouterr().out
