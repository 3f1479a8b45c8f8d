"""`subquad compare forms`: the op alone and the layer, figures, file and refusals."""

import csv

import pytest
import torch

from subquad import cli
from subquad.compare.forms import measure
from subquad.kernels.backend import recorded_calls
from subquad.layers import available

SMALL = ["compare", "forms", "--lengths", "6", "--d-model", "16", "--repeat", "1"]
FIGURES = [
    f"{what} {how} {figure}"
    for what in ("op", "layer")
    for how in ("forward", "train")
    for figure in ("naive ms", "torch ms", "ratio")
]


def test_table_and_csv(tmp_path, capsys):
    file = tmp_path / "forms.csv"
    assert cli.main([*SMALL, "--layers", "GatedDeltaNet", "MLSTM", "--csv", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "MLSTM" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if "\u2502" in line)
    rows = list(csv.DictReader(file.open()))
    assert [row["layer"] for row in rows] == ["GatedDeltaNet", "MLSTM"]
    for row in rows:
        assert list(row) == ["layer", "tokens", *FIGURES]
        assert all(float(row[key]) > 0 for key in FIGURES)
        ratio = float(row["op train naive ms"]) / float(row["op train torch ms"])
        assert float(row["op train ratio"]) == pytest.approx(ratio)


@pytest.mark.parametrize("name", [name for name, layer in available().items() if layer.kind == "mixer"])
def test_every_layer_s_op_is_found_and_measured(name):
    layer = available()[name](16)
    assert all(figure > 0 for figure in measure(layer, 6, 16, 1).values())
    with recorded_calls() as calls:
        layer(torch.randn(1, 6, 16))
    assert calls
    if layer.card.op != "its mixers'":
        assert set(layer.card.op.split(", ")) <= {call.op for call in calls}


def test_a_form_s_own_calls_are_not_counted_twice():
    """`latent_attention` calls `attention`; `_again` would run both."""
    with recorded_calls() as calls:
        available()["LatentAttention"](16)(torch.randn(1, 6, 16))
    assert [call.op for call in calls] == ["norm", "latent_attention"]


def test_measuring_leaves_no_gradients():
    layer = available()["DeltaNet"](16)
    row = measure(layer, 6, 16, 1)
    assert list(row) == FIGURES
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "DeltaNt"], "there is no layer 'DeltaNt'; did you mean 'DeltaNet'?"),
        (["--lengths", "0"], "--lengths has 0; a length is at least 1"),
    ],
)
def test_bad_input(arguments, said, capsys):
    assert cli.main([*SMALL, *arguments]) == 2
    assert said in capsys.readouterr().err
