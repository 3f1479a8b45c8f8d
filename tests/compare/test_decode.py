"""`subquad compare decode`: the states it makes, the figures it gives and what it refuses."""

import csv

import pytest
import torch
import yaml

from subquad import cli
from subquad.compare import decode, results
from subquad.compare.models import find_config
from subquad.kernels.state import KVCache, RingCache, leaves
from subquad.models.lm import LM

MIXERS = {
    "dense": {"name": "Attention", "n_heads": 2},
    "window": {"name": "Attention", "n_heads": 2, "window": 8},
    "constant": {"name": "Retention", "n_heads": 2},
    "blocks": {"name": "TopKAttention", "n_heads": 2, "block": 4, "top_k": 2},
    "whole": {"name": "NystromAttention", "n_heads": 2},
    "bounded": {"name": "Hyena", "max_len": 64},
}


@pytest.fixture
def configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, mixer in MIXERS.items():
        values = {"d_model": 16, "vocab_size": 32, "blocks": [{"pattern": [{"mixer": mixer}]}]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def started(name, context, read):
    torch.manual_seed(0)
    return decode.begin(LM(find_config(f"{name}.yaml")).eval(), 2, context, 5, read)


@pytest.mark.parametrize("name", ["dense", "window", "constant", "blocks"])
def test_what_is_filled_looks_as_if_it_had_been_read(name, configs):
    """Sizes and counts are those of a context that was read; no slot that a step reads is empty."""
    (filled, was_filled), (whole, was_read) = started(name, 200, 20), started(name, 200, 200)
    assert (was_filled, was_read) == (True, False)
    assert filled.lengths == whole.lengths == [199, 199]
    assert [len(u) for u in filled.unread] == [len(u) for u in whole.unread] == [1, 1]
    for (path, kind, ours), (_, _, theirs) in zip(leaves(filled.state), leaves(whole.state), strict=True):
        assert ours.shape == theirs.shape, path
        if kind == "count":
            assert torch.equal(ours, theirs), path
        if kind == "append":
            used = theirs.flatten(2).abs().sum(-1) > 0
            assert (ours.flatten(2).abs().sum(-1)[used] > 0).all(), path
            rows = 20 * ours.shape[1] // 208  # of the entries of the tokens that were read
            assert torch.equal(ours[:, rows : 2 * rows], ours[:, :rows]), path
    step = dict(zip("ab", (filled.step(), whole.step()), strict=True))
    assert all(scores.isfinite().all() for scores in step.values())


def test_a_state_that_differs_by_more_than_its_caches_is_read(configs, monkeypatch):
    def cache(kind, slots):
        return kind(torch.zeros(1, slots, 1, 4), torch.zeros(1, slots, 1, 4), torch.zeros(1, dtype=torch.long))

    assert decode.fillable(cache(KVCache, 3), cache(KVCache, 9))
    assert decode.fillable(cache(RingCache, 9), cache(RingCache, 9))
    assert not decode.fillable(cache(RingCache, 3), cache(RingCache, 9))
    assert not decode.fillable(cache(KVCache, 0), cache(KVCache, 9))
    monkeypatch.setattr(decode, "fillable", lambda source, target: False)
    start, filled = started("dense", 30, 2)
    assert not filled
    assert start.lengths == [29, 29]


def test_a_short_context_is_read_and_goes_on_as_infer_does(configs):
    start, filled = started("dense", 12, 64)
    assert not filled
    assert [len(u) for u in start.unread] == [1, 1]
    assert start.step().shape == (2, 32)
    assert start.lengths == [12, 12]


def test_points_table_and_files(configs, capsys):
    words = ["dense.yaml", "constant.yaml", "whole.yaml", "bounded.yaml", "--contexts", "32", "512", "--read", "40"]
    outputs = ["--new-tokens", "2", "--device", "cpu", "--csv", "d.csv", "--json", "d.json", "--png", "d.png"]
    assert cli.main(["compare", "decode", *words, *outputs]) == 0
    shown = capsys.readouterr().out
    assert "*512" in shown
    assert "40 tokens read, the caches filled" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 100

    measured = results.load("d.json")
    assert measured.command.startswith("subquad compare decode dense.yaml")
    points = {(p.subject.removesuffix(".yaml"), p.tokens): p for p in measured.points}
    assert len(points) == 8
    for name, context in points:
        point = points[name, context]
        fails = name == "whole" or (name == "bounded" and context == 512)
        assert (point.ms is None) == fails
        if fails:
            assert "cannot decode" in point.note or "up to 64 tokens" in point.note
        else:
            assert 0 < point.low_ms <= point.ms <= point.high_ms
    slots = decode.WARM_UP + 2  # beyond the context
    a_slot = 2 * 16 * 4
    assert [points["dense", n].state_bytes for n in (32, 512)] == [(n + slots) * a_slot + 8 for n in (32, 512)]
    assert points["constant", 32].state_bytes == points["constant", 512].state_bytes
    weights = sum(p.numel() for p in LM(find_config("dense.yaml")).parameters())
    assert points["dense", 32].bytes == 4 * weights + points["dense", 32].state_bytes

    with open("d.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows[:2]] == ["dense.yaml"] * 2
    assert float(rows[0]["tokens/s"]) == pytest.approx(1000 / points["dense", 32].ms)
    assert (configs / "d.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_said(configs, monkeypatch, capsys):
    weights = 4 * sum(p.numel() for p in LM(find_config("dense.yaml")).parameters())
    monkeypatch.setattr(decode, "free_bytes", lambda device: weights + 10_000)
    words = ["dense.yaml", "--contexts", "32", "512", "--new-tokens", "2", "--device", "cpu", "--json", "d.json"]
    assert cli.main(["compare", "decode", *words]) == 0
    fits, too_long = results.load("d.json").points
    assert fits.ms is not None
    assert too_long.ms is None
    assert too_long.state_bytes == (512 + decode.WARM_UP + 2) * 128 + 8
    assert too_long.note == f"does not fit: needs about {(weights + too_long.state_bytes) / 1000:.1f} kB"
    assert too_long.note in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mambo2"], "'mambo2' is no shipped configuration, file or folder; did you mean 'mamba2'?"),
        (["dense.yaml", "--contexts", "0"], "--contexts has 0; a context is at least 1"),
        (["dense.yaml", "--batch", "0"], "--batch is 0; it must be at least 1"),
        (["dense.yaml", "--new-tokens", "1"], "--new-tokens is 1; it must be at least 2"),
        (["dense.yaml", "--dtype", "float12"], "there is no dtype 'float12' here"),
        (["dense.yaml", "--device", "tpu9"], "there is no device 'tpu9'"),
        (["dense.yaml", "--png", "dense.yaml"], "dense.yaml exists; pass overwrite (--overwrite) to replace it"),
    ],
)
def test_bad_input(arguments, said, configs, capsys):
    assert cli.main(["compare", "decode", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
