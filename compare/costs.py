"""FLOPs and bytes of layers, models and ops, counted without running them.

A forward pass runs on the meta device, where shapes are all there is. What the ops cost their own formulas say
(subquad.kernels.costs, which says what counts); everything around them, projections above all, torch's FLOP counter
sees. Where the ops run as well, the counter must find the formulas' products: a test holds the two together.

Training is three times the forward pass: the backward pass of a product is two such products. What is computed again
instead of kept is not counted. Prefill is one call over all tokens, so dense attention counts its whole T x T square,
masked half included, as in training; a decoded token counts the whole cache of its context. What a layer computes once
and keeps between calls without gradients, as Hyena its filters, counts in training alone.

Bytes are what must at least be moved: the input, the output, the parameters, each once, and the state that is read and
written; in training the first three and their gradients.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from subquad.errors import UserError
from subquad.kernels import costs
from subquad.kernels.backend import Call, backend, recorded_calls
from subquad.kernels.operators import OPERATORS
from subquad.layers import MoE
from subquad.models.lm import LM

AROUND = ("short_conv", "shift", "running_max", "norm")  # ops beside a layer's mixing op


def count(layer: nn.Module, phase: str, batch: int, tokens: int, d_model: int, dtype: torch.dtype) -> tuple[int, int]:
    """(FLOPs, bytes) of a layer or a model whose parameters are in dtype.

    phase: "train" or "prefill" of `tokens` tokens, or "decode", one token after so many.
    """
    flops, tensors, calls = _counted(layer, phase, batch, tokens, d_model, dtype)
    if phase == "train":
        return 3 * flops, 2 * tensors
    return flops, tensors + sum(costs.cost(call).state for call in calls)


def count_op(
    layer: nn.Module, phase: str, batch: int, tokens: int, d_model: int, dtype: torch.dtype
) -> tuple[int, int]:
    """(FLOPs, bytes) of a layer's mixing ops alone, on what the layer gives them."""
    _, _, calls = _counted(layer, phase, batch, tokens, d_model, dtype)
    calls = mixing(layer, calls)
    found = [costs.cost(call) for call in calls]
    flops, tensors = sum(c.products + c.scans for c in found), sum(map(costs.tensor_bytes, calls))
    return (3 * flops, 2 * tensors) if phase == "train" else (flops, tensors + sum(c.state for c in found))


def mixing(layer: nn.Module, calls: Sequence[Call]) -> list[Call]:
    """Of the calls that a layer made those of the ops its card names, or else all but those of ops around others."""
    card = getattr(layer, "card", None)
    named = [call for call in calls if card and call.op in card.op.split(", ")]
    return named or [call for call in calls if call.op not in AROUND]


def _counted(
    layer: nn.Module, phase: str, batch: int, tokens: int, d_model: int, dtype: torch.dtype
) -> tuple[int, int, list[Call]]:
    """Of a forward pass: FLOPs, the bytes of input, output and parameters, and the calls of ops that have formulas."""
    model: Any = on_meta(layer, dtype)
    new = 1 if phase == "decode" else tokens
    with torch.device("meta"), torch.set_grad_enabled(phase == "train"):
        state = None
        if phase != "train" and hasattr(model, "init_state"):
            state = model.init_state(batch, tokens + (phase == "decode"), dtype)
        elif phase == "decode":
            raise UserError(f"{type(layer).__name__} cannot decode: it reads the whole sequence at once")
        if isinstance(model, LM):
            x = torch.empty(batch, new, dtype=torch.long)
            run = partial(model, x, state, logits="all" if phase == "train" else "last")
        else:
            x = torch.empty(batch, new, d_model, dtype=dtype)
            run = partial(model, x, state)
        if phase != "train":
            forward(run)  # keeps what is computed once
        y, flops, calls = forward(run)
    tensors = x.nbytes + y.nbytes + parameter_bytes(model, batch * new)
    return flops, tensors, [call for call in calls if call.op in costs.OPS]


def forward(run: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, int, list[Call]]:
    """(the output, the FLOPs, the calls of ops) of run(), a forward pass on the meta device that gives (y, state)."""
    with backend("torch"), counter() as around, recorded_calls(_without_values) as calls:
        y, _ = run()
    found = [costs.cost(call) for call in calls if call.op in costs.OPS]
    return y, around.get_total_flops() + sum(c.products + c.scans for c in found), calls


def _without_values(call: Call) -> Any:
    if call.op in costs.OPS:
        return costs.results(call)
    return call.forms["torch"](*call.args, **call.kwargs)  # someone else's op: torch's counter sees what it does


def counter() -> FlopCounterMode:
    """torch's FLOP counter, which also sees the products inside our own operators."""

    def inside(function: Callable[..., Any]) -> Callable[..., int]:
        def flops(*arguments: Any, out_val: Any = None, **options: Any) -> int:
            with counter() as nested:
                function(*arguments, **options)
            return nested.get_total_flops()

        flops._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
        return flops

    ours = {getattr(torch.ops.subquad, name): inside(operator.function) for name, operator in OPERATORS.items()}
    return FlopCounterMode(display=False, custom_mapping=ours)


def on_meta(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode that has shapes and no values."""
    held: dict[int, Any] = {}
    for tensor in (*layer.parameters(), *layer.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        held[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return deepcopy(layer, held).to(dtype).eval()


def parameter_bytes(model: nn.Module, tokens: int) -> int:
    """Of the parameters that so many tokens read, each once; on average where the experts choose."""
    share = shares(model, tokens)
    return round(sum(p.nbytes * share.get(p, 1.0) for p in model.parameters()))


def shares(model: nn.Module, tokens: int) -> dict[Tensor, float]:
    """The share that `tokens` tokens read of the parameters of experts, and of an embedding that is no head."""
    found: dict[Tensor, float] = {}
    for layer in model.modules():
        if isinstance(layer, MoE):
            chosen = layer.router.top_k if layer.causal else layer.capacity_factor
            read = min(1.0, chosen * tokens / layer.experts.down.shape[0])
            found |= dict.fromkeys(layer.experts.parameters(), read)
        elif isinstance(layer, LM) and not layer.config.tie_embeddings:
            found[layer.embedding.weight] = min(1.0, tokens / layer.config.vocab_size)
    return found
