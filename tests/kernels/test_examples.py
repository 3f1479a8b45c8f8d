"""Every op has examples, and its forms agree on them: outputs, new states and all gradients in float64."""

import pytest
import torch

from subquad.errors import UserError
from subquad.kernels.examples import (
    Draw,
    carries,
    differences,
    examples,
    load_ops,
    packs,
    relative_error,
    run,
    sensitivity,
)

OPS = load_ops()


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_has_examples_from_nothing_and_from_a_state(op):
    found = examples(op, time=8)
    both = {True, False}
    assert {example.state is None for example in found} == (both if carries(found[0].op) else {True})
    assert {example.cu_seqlens is None for example in found} == (both if packs(found[0].op) else {True})


def test_an_op_without_examples_is_an_error():
    with pytest.raises(UserError, match="no_such_op has no examples"):
        examples("no_such_op")


@pytest.mark.parametrize(
    ("op", "form", "time"),
    [(op, form, time) for op, forms in sorted(OPS.items()) for form in forms if form == "torch" for time in (1, 7, 70)],
)
def test_forms_agree(op, form, time):
    for example in examples(op, time=time):
        errors = differences(example, form)
        assert {"out"} < set(errors)
        assert all(x < 1e-10 for x in errors.values()), (example.name, errors)


@pytest.mark.parametrize("op", sorted(OPS))
def test_forms_agree_in_float32(op):
    """Against float64: at most 1e-5, or three times what the naive form loses in float32."""
    for example in examples(op, dtype=torch.float32):
        errors, unavoidable = differences(example, "torch"), differences(example, "naive")
        assert all(x <= max(1e-5, 3 * unavoidable[name]) for name, x in errors.items()), (example.name, errors)


def test_a_fault_shows(monkeypatch):
    """One gradient off by one part in a thousand is seen."""
    from subquad.kernels import delta_rule

    naive = delta_rule._FORMS["naive"]

    def wrong(q, k, v, beta, g, S, cu_seqlens):
        return naive(q, k, v, beta + 1e-3 * (beta - beta.detach()), g, S, cu_seqlens)

    monkeypatch.setitem(delta_rule._FORMS, "torch", wrong)
    errors = differences(examples("delta_rule", time=7)[0], "torch")
    assert errors["out"] == 0
    assert 1e-4 < errors["gradient of beta"] < 1e-2


def test_sensitivity_is_how_far_rounded_inputs_move_the_results():
    """A sum of products moves by as much as its inputs; a difference that nearly cancels by far more."""
    example = examples("linear_attention", time=20, dtype=torch.bfloat16)[0]
    step = torch.finfo(torch.bfloat16).eps / 2
    assert 0.3 * step < sensitivity(example, step)["out"] < 3 * step

    def difference(q, k):
        return (q - k).double()

    q = 1 + torch.rand(50)
    cancels = example._replace(op=difference, inputs={"q": q, "k": q + 1e-3}, options={}, state=None)
    assert sensitivity(cancels, step)["out"] > 100 * step


def test_errors_are_relative_and_see_nan_and_shapes():
    one = torch.ones(4)
    assert relative_error(1.5 * one, one) == pytest.approx(0.5)
    assert relative_error(one, torch.zeros(4)) == pytest.approx(2)
    assert not relative_error(one * float("nan"), one) < 1
    assert relative_error(torch.ones(1), one) == float("inf")


def test_examples_repeat():
    first, second = (run(examples("scan", time=5)[0], "torch") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gates_reach_a_full_stop():
    gates = Draw(1, 1, 1, False, torch.float64, torch.Generator().manual_seed(0)).gate(1000)
    assert gates.max() <= 0
    assert (gates == -50).any()
