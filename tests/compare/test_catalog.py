"""`subquad layers`: every layer in the table, every argument of one."""

import inspect
from typing import Literal

import pytest

from subquad import cli
from subquad.compare.catalog import type_name
from subquad.layers import available

LAYERS = available()


def test_table(capsys):
    assert cli.main(["layers"]) == 0
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert set(LAYERS) <= set(rows)
    for name, layer in LAYERS.items():
        assert layer.card is not None, f"{name} has no card"
        assert layer.card.op in rows[name]


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer(name, capsys):
    assert cli.main(["layers", name]) == 0
    out = capsys.readouterr().out
    assert inspect.getdoc(LAYERS[name]).splitlines()[0] in out
    for parameter in list(inspect.signature(LAYERS[name].__init__).parameters)[1:]:
        assert f"│ {parameter} " in out


def test_misspelt_layer(capsys):
    assert cli.main(["layers", "LinearAtention"]) == 2
    assert capsys.readouterr().err == "error: there is no layer 'LinearAtention'; did you mean 'LinearAttention'?\n"


def test_types_are_written_as_in_code():
    assert type_name(int | None) == "int | None"
    assert type_name(Literal["a", "b"]) == "'a' | 'b'"
    assert type_name(Literal["a"] | None) == "'a' | None"
    assert type_name(list[float]) == "list[float]"
