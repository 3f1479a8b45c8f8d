"""`subquad doctor` reports what there is, passes when the ops are right and fails when one is not."""

import sys
from importlib.metadata import version

import torch

from subquad import cli
from subquad.kernels.examples import load_ops

OPS = load_ops()


def test_report(capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert version("torch") in out
    assert sys.version.split()[0] in out
    assert "backend torch" in out
    rows = [line for line in out.splitlines() if "PASS" in line]
    assert {row.split()[1] for row in rows} >= set(OPS)
    assert "FAIL" not in out


def test_a_wrong_op_is_named(capsys, monkeypatch):
    from subquad.kernels import short_conv

    def wrong(*arguments):
        y, last = short_conv._naive(*arguments)
        return y * torch.where(torch.arange(y.shape[1]) == 5, float("nan"), 1.0)[:, None], last

    monkeypatch.setitem(short_conv._FORMS, "torch", wrong)
    few = {op: OPS[op] for op in ("attention", "short_conv")}
    monkeypatch.setattr("subquad.compare.doctor.load_ops", lambda: few)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "short_conv, torch on cpu, no bias, fresh: out is off by nan" in out
    assert "attention, torch" not in out
