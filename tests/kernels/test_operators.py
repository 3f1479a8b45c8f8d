"""Operators: called as they are where nothing watches, and through torch's dispatcher where something does."""

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.errors import UserError
from subquad.kernels.operators import operator


def multiply(x: Tensor, factor: float) -> Tensor:
    return x * factor


scaled, scaled_backward = operator("test_scaled")(multiply), operator("test_scaled_backward")(multiply)
for one in (scaled, scaled_backward):
    one.register_fake(lambda x, factor: torch.empty_like(x))


def _save(ctx, inputs, output):
    ctx.factor = inputs[1]


scaled.register_autograd(lambda ctx, dy: (scaled_backward(dy, ctx.factor), None), setup_context=_save)
scaled_backward.once_differentiable("scaled")


@operator("test_add_", mutates_args=("total",))
def add_(total: Tensor, x: Tensor) -> Tensor:
    total.numpy()[:] += x.numpy()  # as a kernel writes, unseen by torch
    return x.clone()


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


class Wrapped(Tensor):
    seen = 0

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        Wrapped.seen += "test_scaled" in str(function)
        return super().__torch_function__(function, types, arguments, options or {})


def test_gradients_are_the_same_through_the_dispatcher():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for mode in (torch.enable_grad(), Seen()):
        with mode:
            y = scaled(x, 3.0)
            (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(y, 3 * x) and torch.equal(gradient, torch.full_like(x, 3))
    assert mode.names.count("subquad.test_scaled.default") == 1
    assert mode.names.count("subquad.test_scaled_backward.default") == 1


def test_no_history_without_need():
    x = torch.randn(5)
    assert not scaled(x, 2.0).requires_grad
    with torch.no_grad():
        assert not scaled(x.requires_grad_(), 2.0).requires_grad


def test_a_second_derivative_is_an_error():
    x = torch.randn(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(scaled(x, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="scaled has no second derivative"):
        gradient.sum().backward()


def test_what_watches_sees_the_operator():
    x = torch.randn(5)
    with profile() as profiled:
        scaled(x, 2.0)
    assert any("test_scaled" in event.key for event in profiled.key_averages())
    scaled(x.as_subclass(Wrapped), 2.0)
    assert Wrapped.seen == 1
    assert torch.equal(torch.compile(lambda x: scaled(x, 2.0) + 1, backend="aot_eager", fullgraph=True)(x), 2 * x + 1)


@pytest.mark.parametrize("watched", [False, True])
def test_autograd_sees_that_a_saved_tensor_was_overwritten(watched):
    total, x = torch.ones(3), torch.randn(3, requires_grad=True)
    y = x * total
    with torch.no_grad(), Seen() if watched else torch.enable_grad():
        add_(total, torch.ones(3))
    assert torch.equal(total, torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_tensors_may_be_overwritten():
    with torch.inference_mode():
        total = torch.zeros(3)
        add_(total, torch.ones(3))
    assert torch.equal(total, torch.ones(3))
