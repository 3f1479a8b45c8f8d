"""`subquad compare cpu` measures both libraries on models of the same shapes."""

import csv
import json
import sys

import pytest
import torch

from subquad import cli
from subquad.compare.cpu import Ours, Theirs, pairs, torch_only
from subquad.kernels.examples import relative_error

SMALL = ["--tokens", "16", "--new-tokens", "2", "--d-model", "64", "--layers", "2", "--repeat", "1"]


NAMES = list(pairs(64, 2))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_the_same(name):
    """Dimension by dimension, where neither library stacks what the other keeps apart."""
    pair = pairs(128, 4)[name]
    models = [made(pair, 128).model for made in (Ours, Theirs)]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    assert sizes[0] == sizes[1]
    if name in ("mamba", "mamba2", "minimax", "mistral", "mixtral"):
        shapes = [sorted(sorted(n for n in p.shape if n > 1) for p in model.parameters()) for model in models]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_what_is_measured_reads_its_cache(name):
    """A prefill and one token after it are the whole sequence: no figure for a model that forgot its context."""
    tokens = torch.randint(256, (1, 20))
    pair = pairs(64, 4)[name]
    ours, theirs = Ours(pair, 64), Theirs(pair, 64)
    whole = [ours.model(tokens)[0][:, -1], theirs.model(tokens, use_cache=False).logits[:, -1]]
    for model, expected in zip((ours, theirs), whole, strict=True):
        model.begin(20)
        model.step(tokens[:, :-1])
        assert relative_error(model.step(tokens[:, -1:]).flatten(0, -2), expected) < 1e-5


def test_rows(tmp_path, capsys):
    files = [tmp_path / "rows.csv", tmp_path / "rows.json"]
    command = ["compare", "cpu", *SMALL, "--models", "mamba,gated-deltanet"]
    command += ["--csv", str(files[0]), "--json", str(files[1])]
    assert cli.main(command) == 0
    assert "gated-deltanet" in capsys.readouterr().out
    document = json.loads(files[1].read_text())
    assert document["settings"]["tokens"] == 16
    assert document["command"].startswith("subquad compare cpu --tokens 16")
    assert document["versions"].keys() >= {"subquad", "torch", "transformers"}
    rows = document["rows"]
    assert [row["model"] for row in rows] == ["mamba", "gated-deltanet"]
    for row, written in zip(rows, csv.DictReader(files[0].open()), strict=True):
        assert {key: str(value) for key, value in row.items()} == written
        assert all(row[f"{phase} ratio"] > 0 for phase in ("prefill", "decode"))
    assert cli.main(command) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--models", "mamb"], "did you mean 'mamba'"),
        (["--d-model", "100"], "multiple of the head width 64"),
        (["--repeat", "0"], "at least 1"),
    ],
)
def test_bad_input(arguments, sentence, capsys):
    assert cli.main(["compare", "cpu", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_torch_only_hides_kernel_packages_and_brings_them_back(monkeypatch):
    held = object()
    monkeypatch.setitem(sys.modules, "fla", held)
    monkeypatch.delitem(sys.modules, "mamba_ssm", raising=False)
    with torch_only(), pytest.raises(ImportError):
        import fla  # noqa: F401
    assert sys.modules["fla"] is held
    assert "mamba_ssm" not in sys.modules
