"""`subquad doctor` reports what there is, passes when the ops are right and fails when one is not."""

import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from subquad import cli
from subquad.compare import gpu_check
from subquad.kernels import blocked
from subquad.kernels.examples import load_ops

OPS = load_ops()


@pytest.fixture(autouse=True)
def own_block_list(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    blocked.forget()
    yield
    blocked.forget()


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

    naive = short_conv._FORMS["naive"]

    def wrong(*arguments):
        y, last = naive(*arguments)
        return y * torch.where(torch.arange(y.shape[1]) == 5, float("nan"), 1.0)[:, None], last

    monkeypatch.setitem(short_conv._FORMS, "torch", wrong)
    few = {op: OPS[op] for op in ("attention", "short_conv")}
    monkeypatch.setattr("subquad.compare.doctor.load_ops", lambda: few)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "short_conv, torch on cpu, no bias, fresh: out is off by nan" in out
    assert "attention, torch" not in out


@pytest.mark.parametrize("interpreted", [False, True])
def test_triton_forms_without_a_gpu_are_checked_under_the_interpreter_only(interpreted, capsys, monkeypatch):
    from subquad.kernels import short_conv

    monkeypatch.setitem(short_conv._FORMS, "triton", short_conv._FORMS["naive"])
    monkeypatch.setattr("subquad.compare.doctor.load_ops", lambda: {"short_conv": ("naive", "torch", "triton")})
    monkeypatch.setattr("subquad.compare.doctor.INTERPRETED", interpreted)
    monkeypatch.setattr("subquad.kernels.backend.INTERPRETED", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["doctor"]) == 0
    assert ("under the interpreter" in capsys.readouterr().out) == interpreted


def test_a_gpu_report_blocks_what_is_wrong(capsys, monkeypatch):
    """The whole command, with the checks of a GPU that is not there."""
    outcomes = [
        gpu_check.Outcome(gpu_check.Check("short_conv", "cuda:0", torch.float32), {"bias, fresh: out": 0.5}),
        gpu_check.Outcome(gpu_check.Check("scan", "cuda:0", torch.float32), {"real, fresh: out": 1e-6}),
    ]
    monkeypatch.setattr("subquad.compare.doctor.load_ops", lambda: {"short_conv": ("naive", "torch", "triton")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("subquad.compare.doctor._gpus", lambda: {"cuda:0": "Fake GPU"})
    monkeypatch.setattr("subquad.compare.doctor._environment", lambda devices: "environment")
    monkeypatch.setattr("subquad.compare.doctor._self_check", lambda devices: ("self-check", []))
    monkeypatch.setattr(gpu_check, "Running", lambda ops, gpu: SimpleNamespace(outcomes=lambda: outcomes))
    monkeypatch.setattr(gpu_check, "speeds", lambda ops, gpu: f"speeds of {ops}")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "short_conv, triton: bias, fresh: out is off by 5.0e-01 in float32" in out
    assert "speeds of []" in out
    assert [(entry.op, entry.gpu) for entry in blocked.read()] == [("short_conv", "Fake GPU")]
