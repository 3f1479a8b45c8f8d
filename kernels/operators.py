"""Opaque operators: what a compiler must take as one call, with its own shapes and its own derivative.

`operator` does what `torch.library.custom_op` does, with its interface, through `torch.library.Library`: a call costs
half as much (custom_op's wrappers take longer than a small kernel runs), and the first one does not load torch._dynamo.
Where nothing watches, a call of plain tensors does not even go through torch's dispatcher, which takes as long again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.errors import UserError

_LIBRARY = torch.library.Library("subquad", "FRAGMENT")
OPERATORS: dict[str, "Operator"] = {}  # by name, filled as they are defined


class Operator:
    """A function of tensors and numbers, as one node of any graph."""

    def __init__(self, function: Callable[..., Any], name: str, mutates_args: Sequence[str]):
        self.name, self.function = name, function
        OPERATORS[name] = self
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.op = getattr(torch.ops.subquad, name).default
        self.derivative: Any = None
        names = [argument.name for argument in self.op._schema.arguments]
        self.mutated = [names.index(mutated) for mutated in mutates_args]
        if mutates_args:
            _LIBRARY.impl(name, self._counted, "ADInplaceOrView", with_keyset=True)

    def __call__(self, *arguments: Any) -> Any:
        if _watched(arguments):
            return self.op(*arguments)
        if _differentiated(arguments):
            return self.op(*arguments) if self.derivative is None else self.derivative.apply(*arguments)
        self._count_writes(arguments)
        return self.function(*arguments)

    def register_fake(self, shapes: Callable[..., Any]) -> Callable[..., Any]:
        """Declare the function that makes outputs of the right shapes, without values."""
        torch.library.register_fake(f"subquad::{self.name}", shapes, lib=_LIBRARY)
        return shapes

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Declare the derivative: setup_context(ctx, inputs, output) and backward(ctx, *gradients)."""
        op = self.op

        def below(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)

        def derivative(run: Callable[..., Any]) -> Any:
            def forward(ctx: Any, *arguments: Any) -> Any:
                output = run(*arguments)
                setup_context(ctx, arguments, output)
                return output

            methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            return type(self.name, (torch.autograd.Function,), methods)

        self.derivative, dispatched = derivative(self.function), derivative(below)

        def differentiable(*arguments: Any) -> Any:
            return dispatched.apply(*arguments) if _differentiated(arguments) else below(*arguments)

        _LIBRARY.impl(self.name, differentiable, "Autograd")

    def once_differentiable(self, name: str) -> None:
        """Make a derivative of this operator, which is itself a derivative, an error instead of a wrong number."""

        def refuse(ctx: Any, *gradients: Any) -> None:
            raise UserError(
                f"{name} has no second derivative on this backend; use backend('naive') for double backward"
            )

        self.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)

    def _count_writes(self, arguments: Sequence[Any]) -> None:
        """Let autograd see that a tensor it may have saved was overwritten."""
        for place in self.mutated:
            if arguments[place] is not None:
                torch.autograd.graph.increment_version(arguments[place])

    def _counted(self, keys: Any, *arguments: Any) -> Any:
        self._count_writes(arguments)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self.op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)


def _differentiated(arguments: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def _watched(arguments: Sequence[Any]) -> bool:
    """Whether a compiler, a mode, a transform, a profiler or a tensor of another kind has to see the call."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
        or any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in arguments)
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def operator(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Turn a function into the operator subquad::name; `mutates_args` are the tensors it writes into."""
    return lambda function: Operator(function, name, mutates_args)
