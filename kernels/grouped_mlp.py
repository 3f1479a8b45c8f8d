"""The experts' products of a mixture: tokens sorted by expert, one product a group."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subquad.kernels.backend import pick, register

GateName = Literal["silu", "clamped"]


def grouped_mlp(
    x: Float[Tensor, "M D"],
    expert: Int[Tensor, "M k"],
    weight: Float[Tensor, "M k"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
    *,
    gate_up_bias: Float[Tensor, "E F2"] | None = None,
    down_bias: Float[Tensor, "E D"] | None = None,
    gate: GateName = "silu",
) -> Float[Tensor, "M D"]:
    """y_m = sum_j weight[m, j] * MLP_{expert[m, j]}(x_m), dropless.

    gate_up holds each expert's gate and up projections, gate first (F2 = 2 F); down its output projection; each may
    have a bias. MLP_e(x) = down_e (silu(g) * u) for g, u = gate_e x, up_e x, or with gate "clamped" down_e (g
    sigmoid(1.702 g) * (u + 1)) for g at most 7 and u within [-7, 7] (gpt-oss, OpenAI 2025, arXiv:2508.10925). Products
    run in x's dtype. Cost: O(M k D F), whatever the load.
    """
    form = pick("grouped_mlp", _FORMS, x)
    weights = [None if w is None else w.to(x.dtype) for w in (gate_up, down, gate_up_bias, down_bias)]
    return form(x, expert, weight.to(x.dtype), weights, GATES[gate])


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _clamped(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.clamp(max=7.0)
    return gate * (1.702 * gate).sigmoid() * (up.clamp(-7.0, 7.0) + 1)


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"silu": _silu, "clamped": _clamped}


def _naive(x, expert, weight, weights, act):
    """Every expert sees every token; the weights of tokens that did not choose it are zero."""
    y = torch.zeros_like(x)
    for e in range(weights[0].shape[0]):
        chosen = torch.where(expert == e, weight, 0).sum(-1, keepdim=True)
        y = y + chosen * _mlp(x, e, weights, act)
    return y


def _mlp(x: Tensor, e: int, weights: list[Tensor | None], act: Callable) -> Tensor:
    gate_up, down, gate_up_bias, down_bias = (None if w is None else w[e] for w in weights)
    return F.linear(act(*F.linear(x, gate_up, gate_up_bias).chunk(2, -1)), down, down_bias)


def _sorted(x, expert, weight, weights, act):
    if x.shape[0] == 1 and x.device.type == "cpu" and not torch.compiler.is_compiling():  # nothing to sort
        return sum(w * _mlp(x, e, weights, act) for e, w in zip(expert[0].tolist(), weight[0], strict=True))
    order = expert.flatten().argsort(stable=True)
    token = order // expert.shape[1]
    weight = weight.flatten()[order, None]
    gate_up, down, gate_up_bias, down_bias = weights
    counts = (expert.flatten()[:, None] == torch.arange(gate_up.shape[0], device=x.device)).sum(0)
    if _has_grouped_mm(x, down):
        ends, chosen = counts.cumsum(0).to(torch.int32), expert.flatten()[order]
        h = F.grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends)
        h = act(*(h if gate_up_bias is None else h + gate_up_bias[chosen]).chunk(2, -1))
        out = F.grouped_mm(h, down.transpose(1, 2), offs=ends)
        out = out if down_bias is None else out + down_bias[chosen]
        return torch.zeros_like(x).index_add(0, token, out * weight)
    y, lengths = torch.zeros_like(x), counts.tolist()
    for e, (rows, w) in enumerate(zip(token.split(lengths), weight.split(lengths), strict=True)):
        # A tracer cannot branch on a length that depends on the data; no tokens at all still have a gradient.
        if torch.compiler.is_compiling() or len(rows) or not x.shape[0]:
            y = y.index_add_(0, rows, _mlp(x.index_select(0, rows), e, weights, act) * w)
    return y


def _has_grouped_mm(x: Tensor, down: Tensor) -> bool:
    """torch's grouped product wants rows of whole 16 bytes and bf16: torch 2.13 traces it in no other dtype. On a CPU
    it is such a loop itself, which costs more memory traffic than ours."""
    aligned = all(width * x.element_size() % 16 == 0 for width in (x.shape[1], down.shape[2]))
    return aligned and x.dtype == torch.bfloat16 and x.device.type != "cpu"


_FORMS = register("grouped_mlp", naive=_naive, torch=_sorted)
