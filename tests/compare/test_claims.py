"""Stated costs: their reading, every card, and verdicts on figures whose growth is known."""

import csv
import io

import pytest
from rich.console import Console

from subquad.compare.claims import MODELS, complete, rows, table
from subquad.compare.growth import read
from subquad.compare.results import Measurements, Point
from subquad.errors import UserError
from subquad.layers import available

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
LINEAR = {"train": 1.0, "prefill": 1.0, "decode": 0.0, "state": 0.0}


def points(subject, kind="layer", lengths=LENGTHS, flops=None, wobble=0.0, **exponents):
    """What is measured where costs are exact powers of the length; wobble turns every second figure."""
    found, growth = [], LINEAR | exponents
    for i, n in enumerate(lengths):
        odd = 1 + wobble * (-1) ** i
        for phase in ("train", "prefill", "decode"):
            known = {"ms": 1e-3 * n ** growth[phase] * odd, "flops": round(1e3 * n ** (flops or growth[phase]))}
            known |= {"peak_bytes": 100 * n} if phase == "train" else {}
            known |= {"state_bytes": round(4096 * n ** growth["state"])} if phase == "decode" else {}
            found.append(Point(subject, kind, phase, n, **known))
    return found


def measured(*groups):
    settings = {"d_model": 256, "batch": 1}
    return Measurements("", "2026-01-31", {}, {}, settings, [point for group in groups for point in group])


def verdicts(*groups, which="layers"):
    found = rows(measured(*groups))
    return {row["claim"]: row["verdict"] for row in found if row["table"] == which and row["exponent"] is not None}


@pytest.mark.parametrize(
    ("text", "exponents", "value"),
    [
        ("O(T^2 D)", (2, 2), 64 * 64 * 8),
        ("O(T W D)", (1, 1), 64 * 4 * 8),
        ("O(T (T / W + W) D)", (1, 2), 64 * 20 * 8),
        ("O(T D log T)", (1, 1.2), 64 * 8 * 6),
        ("window O(T W D) and words", (1, 1), 64 * 4 * 8),
        ("3 D' + D", (0, 0), 38),
        ("2 S (W - 1) D", (1, 1), 2 * 64 * 3 * 8),
        ("D'^2 / W", (0, 0), 25),
        ("T D / T", (0, 0), 8),
        ("log W", (0, 0), 2),
        ("0", (0, 0), 0),
    ],
)
def test_costs_are_read(text, exponents, value):
    cost = read(text)
    assert cost.exponents() == exponents
    assert cost.value({"T": 64, "S": 64, "D": 8, "W": 4, "D'": 10}) == value


@pytest.mark.parametrize("text", ["", "O(T", "T +", "T ; D", "(T", "T)", "-", "T ^"])
def test_what_is_no_cost_is_one_sentence(text):
    with pytest.raises(UserError, match="is no cost"):
        read(text)


def test_a_window_has_as_many_slots_as_the_window():
    assert read("2 S G K").exponents(("S",)) == (0, 0)


@pytest.mark.parametrize("name", available())
def test_every_card_can_be_read(name):
    layer = available()[name]
    found = {row["claim"]: row for row in rows(measured(points(name))) if row["table"] == "layers"}
    assert list(found) == ["training compute", "prefill", "decode a token", "state"]
    for row in found.values():
        stated = row["stated"] not in ("-", "sum")
        assert stated == (row["expected"] is not None) == (row["verdict"] != "not stated")
    if layer.card.state not in ("-", "sum"):
        assert (found["state"]["expected"] == "0") == layer.constant_state


def test_what_grows_as_stated_agrees():
    assert set(verdicts(points("Mamba2")).values()) == {"agrees"}
    assert set(verdicts(points("Attention", train=2.0, prefill=2.0, decode=1.0, state=1.0)).values()) == {"agrees"}
    assert set(verdicts(points("Hyena", train=1.1, prefill=1.15, decode=1.0, state=1.0)).values()) == {"agrees"}


def test_what_grows_otherwise_does_not():
    found = verdicts(points("Mamba", train=1.4, prefill=0.7, decode=0.2, state=1.0))
    assert found["training compute"] == "disagrees: 1.40, 1 stated"
    assert found["prefill"] == "below: 0.70, 1 stated"
    assert found["decode a token"] == "disagrees: 0.20, 0 stated"
    assert found["state"] == "disagrees: 1.00, 0 stated"


def test_figures_that_scatter_settle_nothing():
    found = verdicts(points("Mamba2", lengths=(4096, 8192, 16384), wobble=0.3))
    assert found["training compute"].startswith("unsettled: -")
    assert found["state"] == "agrees"


def test_the_window_of_a_label_is_read():
    assert set(verdicts(points("Attention, window 512")).values()) == {"agrees"}
    assert verdicts(points("Attention"))["training compute"] == "below: 1.00, 2 stated"


def test_the_op_alone_counts_where_it_was_measured():
    whole, alone = points("Attention", train=1.5, prefill=1.5), points("Attention", "op", train=2.0, prefill=2.0)
    assert verdicts(whole, alone)["training compute"] == "agrees"
    (row,) = (r for r in rows(measured(whole, alone)) if r["claim"] == "prefill" and r["table"] == "layers")
    assert (row["kind"], round(row["exponent"], 3), row["tokens"], row["flops"]) == ("op", 2.0, 32768, 1000 * 32768**2)


def test_sums_are_stated_by_what_was_counted_at_the_same_lengths():
    found = [r for r in rows(measured(points("TopKAttention", train=1.4, flops=1.38))) if r["table"] == "layers"]
    assert found[0]["expected"] == "1.38" and found[0]["verdict"] == "agrees"
    assert verdicts(points("TopKAttention", train=1.4, flops=1.0))["training compute"].startswith("disagrees")


def test_representative_models():
    found = rows(measured(points("Attention", train=2.0, prefill=2.0, decode=1.0), points("S4")))
    survey = [row for row in found if row["table"] == "survey"]
    assert [row["model"] for row in survey[::4]] == [model.name for model in MODELS]
    assert {row["verdict"] for row in survey[8:]} == {"not measured"}
    compute, memory, _, decode = survey[:4]
    assert (compute["stated"], compute["formula"], compute["verdict"]) == ("O(T^2 D)", 32768**2 * 256, "agrees")
    assert (memory["verdict"], memory["formula"]) == ("below: 1.00, 2 stated", 32768**2)
    assert "never holds" in memory["note"] and decode["formula"] == 32768 * 256
    assert survey[7]["formula"] == 4096 / 4  # values of state a channel, times the channels


def test_layers_of_representative_models_are_there():
    assert all(model.layer in available() for model in MODELS)


def test_rows_are_a_table():
    found = rows(measured(points("S4"), points("NystromAttention"), [Point("Mine", "layer", "train", 10, ms=1.0)]))
    file = io.StringIO()
    writer = csv.DictWriter(file, list(found[0]))
    writer.writeheader()
    writer.writerows(found)
    assert "Mine" not in file.getvalue() and file.getvalue().count("NystromAttention") == 8


def test_the_tables_fit_a_terminal():
    few = measured(*(points(name) for name in available()), points("Attention, window 512, n_sinks 4, n_heads 4"))
    console = Console(width=100, file=io.StringIO())
    console.print(table(few))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    cells = [line.split() for line in lines]
    assert ["Transformer", "parallel", "train", "O(T^2", "D)", "275", "G", "2", "1.00"] in [row[:9] for row in cells]
    assert ["GatedDeltaProduct", *["1", ":", "1.00"] * 2, *["0", ":", "0.00"] * 2, "agrees"] in cells


def test_without_representative_models_only_the_layers():
    console = Console(width=100, file=io.StringIO())
    console.print(table(measured(points("HGRN"))))
    assert "Transformer" not in console.file.getvalue() and "HGRN" in console.file.getvalue()


def test_complexity_shows_them_where_all_representative_models_are():
    assert not complete(measured(points("Attention"), points("S4")))
    assert complete(measured(*(points(model.layer) for model in MODELS)))
