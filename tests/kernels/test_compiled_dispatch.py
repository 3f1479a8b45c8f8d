"""Dispatch inside torch.compile(fullgraph=True): the block list is read while tracing, and a warning comes through."""

import json
import warnings

import pytest
import torch

from subquad.kernels import backend as module
from subquad.kernels import blocked
from subquad.kernels.backend import pick

pytestmark = pytest.mark.unchecked
FORMS = {"torch": torch.sin, "triton": torch.cos}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "current_backend", lambda device_type: "triton")
    monkeypatch.setattr(module, "INTERPRETED", True)
    monkeypatch.setattr(module, "_warned", set())
    torch._dynamo.reset()
    blocked.forget()
    yield
    blocked.forget()


def test_an_unfit_call_warns_once_and_takes_the_torch_form():
    def f(x):
        return pick("short_conv", FORMS, x, unfit="a filter of 9 taps")(x)

    x = torch.randn(3)
    with pytest.warns(UserWarning, match="short_conv: the Triton form does not take a filter of 9 taps; the"):
        assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(x), x.sin())


def test_a_blocked_call_is_decided_while_tracing(monkeypatch):
    monkeypatch.setattr(blocked, "gpu_name", lambda index: "Fake GPU")
    monkeypatch.setattr(blocked, "triton_version", lambda: "3.6.9")
    entry = {"op": "scan", "gpu": "Fake GPU", "triton": "3.6.9", "reason": "out is nan", "date": "2026-01-02"}
    blocked.path().parent.mkdir()
    blocked.path().write_text(json.dumps([entry]))

    def f(x):
        return x.sin() if blocked.refusal("scan", 0) else x.cos()

    def g(x):
        return x.sin() if blocked.refusal("short_conv", 0) else x.cos()

    x = torch.randn(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(x), x.sin())
        assert torch.equal(torch.compile(g, backend="aot_eager", fullgraph=True)(x), x.cos())
