"""What `subquad doctor` blocked does not run: one warning and the torch form, an error where it is forced."""

import json
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

from subquad.errors import UserError
from subquad.kernels import backend as module
from subquad.kernels import blocked
from subquad.kernels.backend import backend, pick

ENTRY = {"op": "delta_rule", "gpu": "Fake GPU", "triton": "3.6.9", "reason": "out is off by 0.3", "date": "2026-01-02"}
FORMS = {name: lambda name=name: name for name in ("naive", "torch", "triton")}


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    """A tensor on a GPU that is not there, and what is written in the block list of a user who has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(blocked, "gpu_name", lambda index: "Fake GPU")
    monkeypatch.setattr(blocked, "triton_version", lambda: "3.6.9")
    monkeypatch.setattr(module, "TRITON", True)
    monkeypatch.setattr(module, "_warned", set())
    blocked.forget()
    with FakeTensorMode():
        yield torch.empty(2, device="cuda:0")
    blocked.forget()


def block(*entries):
    blocked.path().parent.mkdir(parents=True, exist_ok=True)
    blocked.path().write_text(json.dumps(entries))
    blocked.forget()


def test_without_a_list_the_triton_form_runs(on_gpu):
    assert pick("delta_rule", FORMS, on_gpu) is FORMS["triton"]


def test_a_blocked_op_runs_its_torch_form_with_one_warning(on_gpu):
    block(ENTRY)
    with pytest.warns(UserWarning) as warned:
        for _ in range(3):
            assert pick("delta_rule", FORMS, on_gpu) is FORMS["torch"]
    assert len(warned) == 1
    message = str(warned[0].message)
    assert all(word in message for word in ("delta_rule", "Fake GPU", "3.6.9", "`subquad doctor`", "off by 0.3"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick("short_conv", FORMS, on_gpu) is FORMS["triton"]


@pytest.mark.parametrize("other", [{"gpu": "Another GPU"}, {"triton": "3.7.0"}])
def test_it_holds_for_one_gpu_and_one_triton(on_gpu, other):
    block({**ENTRY, **other})
    assert pick("delta_rule", FORMS, on_gpu) is FORMS["triton"]
    block({**ENTRY, **other}, ENTRY)
    with pytest.warns(UserWarning, match="blocked"):
        assert pick("delta_rule", FORMS, on_gpu) is FORMS["torch"]


def test_a_forced_one_raises(on_gpu):
    block(ENTRY)
    with backend("triton"), pytest.raises(UserError, match="delta_rule: the Triton form is blocked on Fake GPU"):
        pick("delta_rule", FORMS, on_gpu)
    with backend("triton"), blocked.ignored():
        assert pick("delta_rule", FORMS, on_gpu) is FORMS["triton"]


def test_float64_and_ops_without_a_triton_form_need_no_warning(on_gpu):
    block(ENTRY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick("delta_rule", FORMS, on_gpu.double()) is FORMS["torch"]
        assert pick("delta_rule", {"torch": FORMS["torch"]}, on_gpu) is FORMS["torch"]


def test_the_processor_is_not_blocked(on_gpu):
    block(ENTRY)
    with FakeTensorMode():
        assert pick("delta_rule", FORMS, torch.empty(2)) is FORMS["torch"]


@pytest.mark.parametrize("text", ["[{", '[{"op": "delta_rule"}]', "7"])
def test_a_damaged_list_is_an_error(on_gpu, text):
    block()
    blocked.path().write_text(text)
    with pytest.raises(UserError, match=r"blocked\.json, the list of blocked kernels, is damaged"):
        pick("delta_rule", FORMS, on_gpu)
