"""`subquad compare pick`: predictions worked out by hand, memory, order, reasons and refusals."""

import csv
from dataclasses import replace

import pytest
import torch
import yaml

from subquad import cli
from subquad.compare import shipped
from subquad.compare.pick import choice, parse_bytes, rank, why
from subquad.compare.predict import predict, predict_step
from subquad.compare.results import Point
from subquad.compare.sizes import sizes, specification_of
from subquad.compare.subjects import label
from subquad.infer.state import nbytes
from subquad.layers import Attention, GatedDeltaNet

SUBJECTS = ["Attention", "GatedDeltaNet", "NystromAttention"]


def points(ms, phase="train"):
    return [Point("Attention", "layer", phase, n, y, peak_bytes=10 * n) for n, y in ms.items()]


def parameters(layer):
    return sum(p.numel() for p in layer.parameters())


def test_times_between_and_beyond_the_measured_lengths():
    square = points({1000 * 2**i: 4.0**i for i in range(4)})
    assert predict(square, "ms", 4000) == (16, 16, 16, "measured")
    assert predict(square, "ms", 3000).value == pytest.approx(9)
    assert predict(square, "ms", 3000).how == "between 2,000 and 4,000"
    far = predict(square, "ms", 32000)
    assert far[:3] == pytest.approx((1024, 1024, 1024))
    assert (far.how, far.extrapolated) == ("extrapolated from 8,000 as T^2.00", True)
    assert predict(square, "ms", 500).value == pytest.approx(0.25)
    assert predict(square, "peak_bytes", 16000).value == pytest.approx(160_000)
    noisy = predict(points({1000: 1.0, 2000: 3.2, 4000: 8.0}), "ms", 8000)
    assert noisy.low < noisy.value < noisy.high
    falling = {1000: 9.0, 2000: 8.0, 4000: 7.0}
    assert predict(points(falling), "ms", 8000)[::3] == (14.0, "extrapolated from 4,000 as T^1.00")
    assert predict(points(falling, "decode"), "ms", 8000).value == 7.0
    assert predict(points({1000: 1.0, 2000: 2.0}), "ms", 4000) is None
    assert predict([], "ms", 4000) is None


def test_decoded_tokens_follow_a_line_or_stay():
    steps = points({1000: 3.0, 2000: 4.0, 4000: 6.0}, "decode")
    assert predict_step(steps, 10_000, grows=True).value == pytest.approx(12)
    assert predict_step(steps, 10_000, grows=True).how == "extrapolated from 4,000 along a line"
    assert predict_step(steps, 500, grows=True).value == pytest.approx(2.5)
    assert predict_step(steps, 10_000, grows=False)[:3] == (4, 3, 6)
    assert predict_step(steps, 2000, grows=False).how == "measured"
    assert predict_step(steps[:2], 10_000, grows=True) is None
    assert predict_step([], 10_000, grows=False) is None


def test_sizes_are_those_of_the_built_layer():
    counted = sizes("Attention", "layer", 64, 1000, 3, torch.bfloat16)
    layer = Attention(64)
    assert (counted.parameters, counted.weights) == (parameters(layer), 2 * parameters(layer))
    assert (counted.state, counted.grows) == (nbytes(layer.init_state(3, 1000, torch.bfloat16)), True)
    window = sizes("Attention, n_heads 4, window 16", "layer", 64, 1000, 1, torch.float32)
    assert (window.state, window.grows) == (nbytes(Attention(64, n_heads=4, window=16).init_state(1, 1000)), False)
    assert (
        sizes("NystromAttention", "layer", 64, 100, 1, torch.float32).cannot == "cannot decode: reads whole sequences"
    )
    bounded = sizes("Hyena, max_len 64", "layer", 64, 100, 1, torch.float32)
    assert (bounded.cannot, bounded.too_long) == ("at most 64 tokens", True)
    assert not sizes("Hyena", "layer", 64, 5000, 1, torch.float32).cannot, "its max_len is its user's to choose"


@pytest.mark.parametrize(
    "spec", ["Mamba", {"name": "LinearAttention", "feature_map": "elu", "causal": True, "n_heads": 4}]
)
def test_labels_are_read_back(spec):
    assert specification_of(label(spec)) == spec


def test_memory_and_time_of_a_stack(made_up):
    measured = made_up(SUBJECTS, (1024, 4096, 16384))
    found = choice(measured, "GatedDeltaNet", "layer", 16384, 2, 10)
    n = parameters(GatedDeltaNet(256))
    state = nbytes(GatedDeltaNet(256).init_state(2, 16384))
    assert found.times["train"].value == pytest.approx(10 * 2 * 2 * 16.384)
    assert found.memory["train"] == 10 * (4 * n + 8 * n + 2 * 1000 * 16384 * 2)
    assert found.memory["decode"] == 10 * (4 * n + state)
    assert (found.state, found.grows) == (10 * state, False)
    assert "prefill" not in found.memory, "its peak was not measured"

    peaks = [replace(p, peak_bytes=5 * 10**6) if p.phase == "prefill" else p for p in measured.points]
    found = choice(replace(measured, points=peaks), "GatedDeltaNet", "layer", 16384, 1, 10)
    state = nbytes(GatedDeltaNet(256).init_state(1, 16384))
    assert found.memory["prefill"] == 10 * (4 * n + state) + 5 * 10**6 - state


def test_order_and_reasons(made_up):
    measured = made_up(SUBJECTS, (1024, 4096, 16384))
    dense, delta, whole = (choice(measured, subject, "layer", 131072, 1, 24) for subject in SUBJECTS)
    cache = 24 * nbytes(Attention(256).init_state(1, 131072))
    assert dense.state == cache == 24 * (131072 * 2 * 256 * 4 + 8)
    assert dense.times["decode"].value == pytest.approx(24 * 131.072)
    assert [rank(c, "decode", 24 * 10**9)[0] for c in (delta, dense, whole)] == [0, 0, 3]
    assert [rank(c, "decode", 5 * 10**9)[0] for c in (delta, dense, whole)] == [0, 2, 3]
    reads = "reads a 6.44 GB cache, which grows; extrapolated from 16,384 along a line"
    assert why(dense, "decode", 24 * 10**9) == reads
    assert why(dense, "decode", 5 * 10**9) == f"does not fit: 6.44 GB of state; {reads}"
    assert why(delta, "decode", 24 * 10**9) == "state of one size"
    assert why(whole, "decode", 24 * 10**9) == "cannot decode: reads whole sequences"
    assert "of activations and gradients; extrapolated from 16,384 as T^1.00" in why(delta, "train", 10**6)
    assert why(dense, "train", 10**12) == "does not fit: needs about 38 GB", "as the file says it"


def test_tables_and_csv(made_up, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_up(SUBJECTS).save("cost.json")
    model = {"d_model": 16, "vocab_size": 32, "blocks": [{"pattern": [{"mixer": "Retention"}]}]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(model))
    words = ["decode", "small.yaml", "--contexts", "8", "--new-tokens", "2", "--device", "cpu", "--json", "d.json"]
    assert cli.main(["compare", *words]) == 0
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ["--length", "131072", "--memory", "24GB", "--from", "cost.json", "d.json", "--csv", "p.csv"]
    assert cli.main(["compare", "pick", *arguments]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Stacks of 24 layers of width 256: 131,072 tokens, batch 1, 24.0 GB; best for decode first" in shown
    assert "cost.json, Example & Sons <i>CPU</i>, float32, batch 1 measured 2026-01-31, torch 2.13.0" in shown
    assert shown.index("GatedDeltaNet") < shown.index(" Attention -") < shown.index("NystromAttention")
    assert "Models: 131,072 tokens" in shown and "small.yaml" in shown
    with open("p.csv", newline="") as file:
        rows = {row["subject"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*sorted(SUBJECTS, key=["GatedDeltaNet", "Attention", "NystromAttention"].index), "small.yaml"]
    assert float(rows["GatedDeltaNet"]["decode ms"]) == pytest.approx(48)
    assert rows["GatedDeltaNet"]["train fits"] == "True"
    assert rows["Attention"]["decode from"] == "extrapolated from 16,384 along a line"
    assert rows["small.yaml"]["decode fits"] == "True"


def test_shipped_measurements_serve_every_device():
    assert shipped.devices()
    for device in shipped.devices():
        for phase in ("train", "prefill", "decode"):
            words = ["--length", "65536", "--device", device, "--for", phase, "--memory", "80GB"]
            assert cli.main(["compare", "pick", *words]) == 0


def test_amounts_of_memory():
    assert [parse_bytes(text) for text in ("24GB", "80 GiB", "1.5kb", "4096")] == [24 * 10**9, 80 * 2**30, 1500, 4096]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: --length"),
        (["--length", "0"], "--length is 0; it must be at least 1"),
        (["--length", "9", "--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--length", "9", "--memory", "much"], "--memory is 'much'; write it as 24GB, 80GiB or a number of bytes"),
        (["--length", "9", "--memory", "0GB"], "--memory is '0GB'"),
        (["--length", "9", "--for", "fun"], "--for is 'fun'; it must be one of train, prefill, decode"),
        (["--length", "9", "--device", "tpu"], "there are no shipped measurements of 'tpu', only of "),
        (["--length", "9", "--device", "cpu", "--from", "cost.json"], "goes without it"),
        (["--length", "9", "--from", "none.json"], "cannot read none.json"),
        (["--length", "9", "--from", "other.json"], "other.json holds no measurements of subquad compare"),
        (["--length", "9", "--from", "cost.json", "--for", "train"], "there is no measurement of train of a layer"),
        (["--length", "9", "--from", "cost.json", "--csv", "other.json"], "other.json exists"),
    ],
)
def test_bad_input(arguments, said, made_up, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    measured = made_up(["Attention"])
    replace(measured, points=[p for p in measured.points if p.phase != "train"]).save("cost.json")
    (tmp_path / "other.json").write_text("[]")
    assert cli.main(["compare", "pick", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
