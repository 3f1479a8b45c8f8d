"""The experts' products of a mixture: tokens sorted by expert, one product a group."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subquad.kernels.backend import pick, register


def grouped_mlp(
    x: Float[Tensor, "M D"],
    expert: Int[Tensor, "M k"],
    weight: Float[Tensor, "M k"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
) -> Float[Tensor, "M D"]:
    """y_m = sum_j weight[m, j] * SwiGLU_{expert[m, j]}(x_m), dropless.

    gate_up holds each expert's gate and up projections, gate first (F2 = 2 F); down its output projection.
    SwiGLU_e(x) = down_e (silu(gate_e x) * up_e x). Products run in x's dtype. Cost: O(M k D F), whatever the load.
    """
    form = pick("grouped_mlp", _FORMS, x)
    return form(x, expert, weight, gate_up.to(x.dtype), down.to(x.dtype))


def _naive(x, expert, weight, gate_up, down):
    """Every expert sees every token; the weights of tokens that did not choose it are zero."""
    y = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        chosen = torch.where(expert == e, weight, 0).sum(-1, keepdim=True)
        y = y + chosen.to(x.dtype) * _swiglu(x, gate_up[e], down[e])
    return y


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def _sorted(x, expert, weight, gate_up, down):
    if x.shape[0] == 1 and x.device.type == "cpu" and not torch.compiler.is_compiling():  # nothing to sort
        outs = [
            w * _swiglu(x, gate_up[e], down[e]) for e, w in zip(expert[0].tolist(), weight[0].to(x.dtype), strict=True)
        ]
        return sum(outs)
    order = expert.flatten().argsort(stable=True)
    token = order // expert.shape[1]
    weight = weight.flatten()[order, None].to(x.dtype)
    counts = (expert.flatten()[:, None] == torch.arange(gate_up.shape[0], device=x.device)).sum(0)
    if _has_grouped_mm(x, down):
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        return torch.zeros_like(x).index_add(0, token, out * weight)
    y, lengths = torch.zeros_like(x), counts.tolist()
    for e, (rows, w) in enumerate(zip(token.split(lengths), weight.split(lengths), strict=True)):
        if torch.compiler.is_compiling() or len(rows):  # a tracer cannot branch on a length that depends on the data
            y = y.index_add_(0, rows, _swiglu(x.index_select(0, rows), gate_up[e], down[e]) * w)
    return y


def _has_grouped_mm(x: Tensor, down: Tensor) -> bool:
    """torch's grouped product wants rows of whole 16 bytes, bf16 on GPUs, and no float64 anywhere.

    On a CPU it is such a loop itself, which costs more memory traffic than ours but can be traced.
    """
    aligned = all(width * x.element_size() % 16 == 0 for width in (x.shape[1], down.shape[2]))
    if x.device.type == "cpu":
        return aligned and x.dtype == torch.float32 and torch.compiler.is_compiling()
    return aligned and x.dtype == torch.bfloat16


_FORMS = register("grouped_mlp", naive=_naive, torch=_sorted)
