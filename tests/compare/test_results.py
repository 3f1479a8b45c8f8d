"""The file of measured costs: what is written is read, and nothing else is."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch

from subquad.compare.results import Measurements, Point, begin, load
from subquad.errors import UserError

POINTS = [
    Point("Mamba2", "layer", "train", 64, 1.5, 1.25, 2.0, 10, 20, 30, 40),
    Point("Mamba2", "op", "prefill", 32, 0.5, 0.5, 0.5, energy_j=0.25),
    Point("Mamba2", "op", "prefill", 16, 0.25, 0.25, 0.5),
    Point("Hyena", "layer", "decode", 4096, note="at most 2,048 tokens"),
]


def some() -> Measurements:
    found = begin("subquad compare complexity --layers Mamba2", torch.device("cpu"), {"d_model": 16, "batch": 1})
    found.points.extend(POINTS)
    return found


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "cost.json"
    some().save(path)
    assert load(path) == some()
    lines = path.read_text().splitlines()
    assert sum('"subject"' in line for line in lines) == len(POINTS)  # one a line
    with pytest.raises(UserError, match="exists; pass overwrite"):
        some().save(path)
    replace(some(), points=[]).save(path, overwrite=True)
    assert load(path).points == []


def test_it_says_where_and_with_what():
    found = some()
    assert found.created == datetime.now(UTC).date().isoformat()
    assert found.machine["device"] == "cpu"
    assert found.machine["name"]
    assert found.machine["threads"] == torch.get_num_threads()
    assert found.machine["memory_bytes"] > 2**28
    assert found.versions["torch"] == torch.__version__
    assert set(found.versions) == {"subquad", "torch", "triton", "python"}


def test_selecting():
    found = some()
    assert found.subjects() == ["Mamba2", "Hyena"]
    assert found.subjects("op") == ["Mamba2"]
    assert [p.tokens for p in found.select("op", "prefill")] == [16, 32]
    assert list(found.select("op", "prefill", "Hyena")) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: [], "holds no measurements of subquad compare: it has no 'format' and 'points'"),
        (lambda found: {"points": []}, "holds no measurements of subquad compare"),
        (lambda found: found | {"format": 2}, "has format 2; this version of subquad reads format 1"),
        (lambda found: {k: v for k, v in found.items() if k != "machine"}, "missing or unknown: machine"),
        (lambda found: found | {"extra": 1}, "missing or unknown: extra"),
        (lambda found: found | {"command": 7}, "command is 7, which is no str"),
        (lambda found: found | {"points": [7]}, "point 1 is a int; it must be a mapping"),
        (lambda found: found | {"points": [found["points"][0] | {"phase": "dream"}]}, "point 1: phase is 'dream'"),
        (lambda found: found | {"points": [found["points"][0] | {"ms": "1"}]}, "point 1: ms is '1'"),
        (lambda found: found | {"points": [found["points"][0] | {"tokens": True}]}, "point 1: tokens is True"),
    ],
)
def test_other_files_are_refused(change, said, tmp_path):
    path = tmp_path / "cost.json"
    some().save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError) as error:
        load(path)
    assert said in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_files_that_are_no_json_are_refused(tmp_path):
    path = tmp_path / "cost.json"
    with pytest.raises(UserError, match=r"cannot read .*cost.json: No such file or directory"):
        load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="holds no measurements"):
        load(path)


def test_whole_numbers_may_stand_for_milliseconds(tmp_path):
    path = tmp_path / "cost.json"
    found = some()
    found.points[0] = replace(found.points[0], ms=2)
    found.save(path)
    (first, *_) = load(path).points
    assert first.ms == 2.0
    assert isinstance(first.ms, float)
