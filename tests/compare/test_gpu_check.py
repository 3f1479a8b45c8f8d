"""What doctor makes of the Triton forms' checks: verdicts, the block list, processes of their own."""

import json
import multiprocessing
import os
import time

import pytest
import torch
from rich.console import Console

from subquad.compare import doctor, gpu_check
from subquad.compare.gpu_check import Check, Outcome
from subquad.compare.kernel_cases import CASES
from subquad.errors import UserError
from subquad.kernels import backend as module
from subquad.kernels import blocked
from subquad.kernels.examples import examples
from subquad.kernels.triton import configs
from subquad.kernels.triton.configs import Entry, Kernel

GPU, TRITON = "Fake GPU", "3.6.9"
SINGLE, HALF = torch.float32, torch.bfloat16
RIGHT = {SINGLE: {"out": 1e-6}, HALF: {"out": 4e-3}}
WRONG = {SINGLE: {"out": 1e-6}, HALF: {"out": 4e-3, "gradient of q": 0.3}}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(blocked, "gpu_name", lambda index: GPU)
    monkeypatch.setattr(blocked, "triton_version", lambda: TRITON)
    blocked.forget()
    yield
    blocked.forget()


def report(**errors):
    """Doctor's report on ops whose checks ended so, and which of them dispatch blocks after it."""
    outcomes = []
    for op, found in errors.items():
        if isinstance(found, Outcome):
            outcomes.append(found._replace(check=Check(op, "cuda:0", SINGLE)))
        else:
            outcomes += [Outcome(Check(op, "cuda:0", dtype), seen) for dtype, seen in found.items()]
    table, reasons, lines = gpu_check.verdicts(outcomes, "title", "BLOCKED")
    said = gpu_check.keep_list(outcomes, reasons, GPU, TRITON)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get(), lines, said, [op for op in errors if blocked.refusal(op, 0)]


def test_a_wrong_op_is_blocked_and_leaves_the_list_when_it_is_right():
    table, lines, said, shut = report(delta_rule=WRONG, short_conv=RIGHT)
    assert shut == ["delta_rule"]
    assert lines == ["delta_rule, triton: gradient of q is off by 3.0e-01 in bfloat16"]
    assert "BLOCKED" in table
    assert "PASS" in table
    assert said == [f"Blocked on {GPU} with triton {TRITON}: delta_rule; torch forms run instead ({blocked.path()})."]
    assert "gradient of q is off by 3.0e-01 in bfloat16" in blocked.refusal("delta_rule", 0)

    table, lines, said, shut = report(delta_rule=RIGHT, short_conv=RIGHT)
    assert (lines, shut, blocked.read()) == ([], [], [])
    assert said == [f"delta_rule is right now; its Triton form runs again on {GPU}."]


def test_entries_of_other_gpus_and_ops_stay():
    others = [
        blocked.Blocked("delta_rule", "Another GPU", TRITON, "out is nan", "2026-01-02"),
        blocked.Blocked("delta_rule", GPU, "3.5.0", "out is nan", "2026-01-02"),
        blocked.Blocked("scan", GPU, TRITON, "out is nan", "2026-01-02"),
    ]
    outcomes = [Outcome(Check("delta_rule", "cuda:0", HALF), RIGHT[HALF])]
    blocked.path().parent.mkdir(parents=True)
    blocked.path().write_text(json.dumps([entry._asdict() for entry in others]))
    assert gpu_check.keep_list(outcomes, {}, GPU, TRITON) == []
    assert blocked.read() == others
    gpu_check.keep_list(outcomes, {"delta_rule": "worse"}, GPU, TRITON)
    assert blocked.read()[:3] == others
    assert blocked.read()[3].reason == "worse"


@pytest.mark.parametrize("errors", [{SINGLE: {"out": float("nan")}}, {SINGLE: {"out": 2e-4}}])
def test_nan_and_what_is_above_the_tolerance_is_wrong(errors):
    assert report(scan=errors)[3] == ["scan"]


def test_a_form_that_does_not_run_is_wrong():
    found = Outcome(Check("scan", "", HALF), {}, failure="real does not run (OutOfResources: shared memory)")
    assert report(scan=found)[3] == ["scan"]
    assert "real does not run (OutOfResources: shared memory)" in blocked.refusal("scan", 0)


def test_what_could_not_be_checked_stays_as_it_was():
    report(scan=WRONG)
    table, lines, _, shut = report(scan=Outcome(Check("scan", "", HALF), {}, unknown="scan: not enough GPU memory"))
    assert shut == ["scan"]
    assert lines == ["scan: not enough GPU memory"]
    assert "not checked" in table


def test_a_damaged_list_is_told():
    blocked.path().parent.mkdir(parents=True)
    blocked.path().write_text("{")
    with pytest.raises(UserError, match="delete it and run `subquad doctor`"):
        report(scan=RIGHT)


def test_checks_cover_every_op_and_case():
    found = gpu_check.checks([*dict.fromkeys(case.op for case in CASES), "scan"], "cuda:0", (9, 0))
    assert {check.case for check in found} == {None, *(case.name for case in CASES)}
    settings = {(check.setting, check.dtype, check.variant) for check in gpu_check.checks(["scan"], "cuda:0", (9, 0))}
    assert settings == {(setting, dtype, n) for setting, dtype in gpu_check.SETTINGS for n in range(2)}
    assert found[0].widths[0] == 256
    assert {(check.setting, check.dtype) for check in gpu_check.checks(["norm"], "cuda:0")} == set(gpu_check.STATELESS)


def test_cases_use_every_entry_of_this_gpu(monkeypatch):
    """Of "affine" and "carry", which linear attention launches with a decay for every channel and without."""
    entries = (
        Entry((9, 0), {"K": 128, "V": 256, "size": 2}, {}),
        Entry((9, 0), {"K": 256, "V": 256, "size": 4}, {}),
        Entry((8, 0), {"K": 32, "V": 32}, {}),
        Entry((9, 0), {"D": 32}, {}),
    )
    monkeypatch.setattr(configs, "SHIPPED", {"affine": Kernel({}, {}, entries), "carry": Kernel({}, {}, entries[:1])})
    configs.forget()
    found = gpu_check._cases((9, 0))
    monkeypatch.undo()
    configs.forget()
    usual = [(case, at) for at in gpu_check.USUAL for case in CASES]
    assert found[-len(usual) :] == usual
    assert [(case.name, at) for case, at in found[: -len(usual)]] == [
        ("vector decay", (256, 256, SINGLE)),
        ("vector decay", (128, 256, HALF)),
        ("no decay", (128, 256, HALF)),
    ]


def test_an_entry_is_checked_by_a_case_that_takes_it_in_every_precision(monkeypatch):
    """Of two for two readers KDA's one writer takes the narrower; without a size both are of both precisions."""
    entries = (
        Entry((9, 0), {"K": 256, "readers": 2, "writers": 2}, {}),
        Entry((9, 0), {"K": 256, "readers": 2, "writers": 1}, {"num_warps": 8}),
    )
    monkeypatch.setattr(configs, "SHIPPED", {"pair_scores": Kernel({}, {}, entries)})
    configs.forget()
    found = gpu_check._cases((9, 0))
    monkeypatch.undo()
    configs.forget()
    names = {(case.name, at) for case, at in found if at not in gpu_check.USUAL}
    assert names == {(name, (256, 256, dtype)) for name in ("KDA", "RWKV-7") for dtype in (HALF, SINGLE)}


def test_run_tells_errors_from_failures(monkeypatch):
    """With a Triton form that is the plain one, one that is wrong, and one that fails."""
    from subquad.kernels import short_conv as conv

    def wrong(*arguments):
        return tuple(1.01 * x for x in conv._FORMS["naive"](*arguments))

    def broken(*arguments):
        raise RuntimeError("PassManager::run\nfailed")

    monkeypatch.setattr(module, "INTERPRETED", True)
    check = Check("short_conv", "cpu", SINGLE, setting="packed, carried")
    for form, verdict in ((conv._FORMS["naive"], 0), (wrong, 1), (broken, 2)):
        monkeypatch.setattr(conv, "_FORMS", {**conv._FORMS, "triton": form})
        outcome = gpu_check.run(check)
        assert bool(outcome.errors) == (verdict < 2)
        assert bool(outcome.wrong()) == (verdict > 0)
    assert outcome.failure == "no bias, packed, carried does not run (RuntimeError: PassManager::run failed)"


def test_what_is_timed_is_called_by_its_check_as_it_is_timed(monkeypatch):
    """So that it is compiled beside the others: without gradients, and without those of constants."""
    import subquad.kernels.linear_attention as linear

    def seen(q, k, v, g, *rest):
        calls.append((torch.is_grad_enabled(), g.requires_grad))
        return linear._FORMS["naive"](q, k, v, g, *rest)

    monkeypatch.setattr(module, "INTERPRETED", True)
    monkeypatch.setattr(gpu_check, "TIMED", gpu_check.TIMED._replace(H=1, D=8))
    monkeypatch.setattr(linear, "_FORMS", {**linear._FORMS, "triton": seen})
    for width, expected in ((4, [(True, True)]), (8, [(True, True), (True, False), (False, False)])):
        calls = []
        check = Check("linear_attention", "cpu", SINGLE, case="constant decay", widths=(width, width))
        assert not gpu_check.run(check).wrong()
        assert calls == expected


def _serve(pipe):
    """Three kinds of checks: one that kills its process, one that hangs, and one that is right."""
    while True:
        check = pipe.recv()
        if check.op == "dies":
            os._exit(11)
        if check.op == "hangs":
            time.sleep(60)
        pipe.send(Outcome(check, {"out": float(os.getpid())}))


def test_a_check_that_dies_or_hangs_is_told_and_the_next_one_runs(monkeypatch):
    """In a forked process, which can be given another function to run."""
    monkeypatch.setattr(gpu_check, "_serve", _serve)
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(gpu_check.multiprocessing, "get_context", lambda name: fork)
    worker = gpu_check.Worker()
    served = []
    for op, failure in (
        ("right", None),
        ("right", None),
        ("dies", "example 3, fresh, ends its process with code 11"),
        ("right", None),
        ("hangs", "KDA at widths 64 and 128 does not end within 0.1 s"),
        ("right", None),
    ):
        check = Check(op, "cpu", HALF, 2, "fresh")
        if op == "hangs":
            check = Check(op, "cpu", HALF, case="KDA", widths=(64, 128))
        outcome = worker.run(check, 0.1 if op == "hangs" else 60)
        assert outcome.check == check and outcome.failure == failure
        served += [outcome.errors["out"]] if failure is None else []
    worker.stop()
    assert served[0] == served[1] and len(set(served)) == 3


def test_errors_may_be_what_a_few_roundings_of_the_inputs_make():
    outcome = Outcome(Check("scan", "", HALF), {"out": 0.03, "last": 0.03, "first": 0.01}, {"out": 0.04})
    assert outcome.wrong() == ["last is off by 3.0e-02 in bfloat16"]
    assert Outcome(Check("scan", "", SINGLE), {"out": 0.01}).wrong() == ["out is off by 1.0e-02 in float32"]


def test_one_gpu_of_each_kind_is_checked(monkeypatch):
    names = ["NVIDIA H200", "NVIDIA L4", "NVIDIA H200"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[i])
    assert doctor._gpus() == {"cuda:0": "NVIDIA H200", "cuda:1": "NVIDIA L4"}


def test_checks_are_all_examples_of_an_op():
    """Fresh, packed and carried, and in place in every setting."""
    op = "linear_attention"
    names = [
        e.name for check in gpu_check.checks([op], "cuda") for e in gpu_check._examples(check._replace(device="cpu"))
    ]
    variants = {e.name.removesuffix(", fresh") for e in examples(op, time=3) if e.name.endswith(", fresh")}
    assert len(names) == len(variants) * (3 + 2 * 2) and len(variants) > 3
    for setting in ("fresh", "packed, carried", "carried, in place", "packed, carried, in place"):
        assert {f"{variant}, {setting}" for variant in variants} <= set(names)
