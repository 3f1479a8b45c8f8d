"""Opaque operators: what a compiler must take as one call, with its own shapes and its own derivative.

`operator` does what `torch.library.custom_op` does, with its interface, through `torch.library.Library`: a call costs
half as much (custom_op's wrappers take longer than a small kernel runs), and the first one does not load torch._dynamo.
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
        if mutates_args:
            names = [argument.name for argument in self.op._schema.arguments]
            self._count_writes([names.index(mutated) for mutated in mutates_args])

    def __call__(self, *arguments: Any) -> Any:
        return self.op(*arguments)

    def register_fake(self, shapes: Callable[..., Any]) -> Callable[..., Any]:
        """Declare the function that makes outputs of the right shapes, without values."""
        torch.library.register_fake(f"subquad::{self.name}", shapes, lib=_LIBRARY)
        return shapes

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Declare the derivative: setup_context(ctx, inputs, output) and backward(ctx, *gradients)."""
        op = self.op

        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments)
            setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        derivative = type(self.name, (torch.autograd.Function,), methods)

        def differentiable(*arguments: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
                return derivative.apply(*arguments)  # type: ignore[no-untyped-call]
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)

        _LIBRARY.impl(self.name, differentiable, "Autograd")

    def once_differentiable(self, name: str) -> None:
        """Make a derivative of this operator, which is itself a derivative, an error instead of a wrong number."""

        def refuse(ctx: Any, *gradients: Any) -> None:
            raise UserError(
                f"{name} has no second derivative on this backend; use backend('naive') for double backward"
            )

        self.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)

    def _count_writes(self, places: list[int]) -> None:
        """Let autograd see that a tensor it may have saved was overwritten."""
        op = self.op

        def counted(keys: Any, *arguments: Any) -> Any:
            for place in places:
                if arguments[place] is not None:
                    torch.autograd.graph.increment_version(arguments[place])
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

        _LIBRARY.impl(self.name, counted, "ADInplaceOrView", with_keyset=True)


def operator(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Turn a function into the operator subquad::name; `mutates_args` are the tensors it writes into."""
    return lambda function: Operator(function, name, mutates_args)
