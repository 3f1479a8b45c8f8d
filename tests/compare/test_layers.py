"""`subquad compare layers`: figures, files and refusals."""

import csv

import pytest
import torch

from subquad import cli
from subquad.compare.layers import _read, measure
from subquad.layers import Attention, LinearAttention, SwiGLU

SMALL = ["compare", "layers", "--lengths", "8", "32", "--d-model", "16", "--repeat", "1", "--new-tokens", "2"]


def test_table_csv_and_curves(tmp_path, capsys):
    table, picture = tmp_path / "cost.csv", tmp_path / "cost.png"
    layers = ["--layers", "Attention", "{name: Attention, window: 4}", "LinearAttention"]
    assert cli.main([*SMALL, *layers, "--csv", str(table), "--png", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "LinearAttention" in shown
    rows = list(csv.DictReader(table.open()))
    names = ["Attention", "Attention, window 4", "LinearAttention"]
    assert [(row["layer"], int(row["tokens"])) for row in rows] == [(name, n) for name in names for n in (8, 32)]
    assert all(float(row[key]) > 0 for row in rows for key in ("train ms", "prefill ms", "decode ms"))
    size = {(row["layer"], row["tokens"]): int(row["state bytes"]) for row in rows}
    caches = 2 * 16 * 4  # bytes of keys and values a token
    assert size["Attention", "32"] - size["Attention", "8"] == caches * (32 - 8)
    assert size["LinearAttention", "32"] == size["LinearAttention", "8"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_decode_has_no_figure_for_it():
    (row,) = measure(LinearAttention(16, causal=False), [torch.randn(1, 8, 16)], 2, 1)
    assert row["train ms"] > 0
    assert row["prefill ms"] is row["decode ms"] is row["state bytes"] is None


def test_only_decoding(tmp_path, capsys, monkeypatch):
    """Of layers with a constant state unless others are named; a long context is read in pieces."""
    monkeypatch.setattr("subquad.compare.layers.PIECE", 5)
    table = tmp_path / "decode.csv"
    assert cli.main([*SMALL, "--only-decode", "--csv", str(table)]) == 0
    rows = list(csv.DictReader(table.open()))
    names = {row["layer"] for row in rows}
    assert {"Mamba", "RWKV7", "GatedShortConv"} <= names
    assert not names & {"Attention", "LatentAttention", "NystromAttention", "SwiGLU"}
    assert all(row["train ms"] == row["prefill ms"] == "" for row in rows)
    assert [float(row["decode ratio"]) for row in rows if row["tokens"] == "8"] == [1.0] * len(names)
    assert all(float(row["decode ratio"]) > 0 for row in rows)
    assert cli.main([*SMALL, "--only-decode", "--layers", "NystromAttention"]) == 2
    assert "NystromAttention cannot decode" in capsys.readouterr().err


def test_the_state_that_decoding_starts_from_is_that_of_the_whole_sequence(monkeypatch):
    monkeypatch.setattr("subquad.compare.layers.PIECE", 3)
    layer, x = LinearAttention(16), torch.randn(1, 8, 16)
    with torch.no_grad():
        expected, _ = layer(torch.cat([x, x[:, :1]], 1))
        y, _ = layer(x[:, :1], _read(layer, x, 1))
    torch.testing.assert_close(y, expected[:, -1:])


def test_stateless_layers_have_zero_bytes():
    assert measure(SwiGLU(16), [torch.randn(1, 8, 16)], 2, 1)[0]["state bytes"] == 0


def test_measuring_leaves_no_gradients():
    layer = Attention(16)
    measure(layer, [torch.randn(1, 8, 16)], 2, 1)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "Atention"], "there is no layer 'Atention'; did you mean 'Attention'?"),
        (["--layers", "{name: Attention, windw: 4}"], "unknown key 'windw'; did you mean 'window'?"),
        (["--layers", "{name: "], "is no valid YAML"),
        (["--layers", "7"], "'7' is neither a name nor a mapping"),
        (["--lengths", "0"], "--lengths has 0; a length is at least 1"),
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--device", "abacus"], "there is no device 'abacus'"),
        (["--dtype", "float12"], "there is no dtype 'float12' here; did you mean 'float"),
        (["--length", "8"], "subquad compare layers has no option --length; did you mean '--lengths'?"),
    ],
)
def test_bad_input(arguments, said, capsys):
    assert cli.main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_existing_files_are_refused_before_any_work(tmp_path, capsys, monkeypatch):
    existing = tmp_path / "cost.png"
    existing.write_text("mine")
    monkeypatch.setattr("subquad.compare.layers.measure", lambda *arguments: pytest.fail("it measured first"))
    assert cli.main([*SMALL, "--png", str(existing)]) == 2
    assert "exists; pass overwrite (--overwrite) to replace it" in capsys.readouterr().err
    assert existing.read_text() == "mine"


def test_overwrite(tmp_path):
    existing = tmp_path / "cost.csv"
    existing.write_text("old")
    assert cli.main([*SMALL, "--layers", "SwiGLU", "--csv", str(existing), "--overwrite"]) == 0
    assert existing.read_text().startswith("layer,tokens")
