"""Causal depthwise convolution over a few tokens, and its one-tap cousin, the token shift."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.packing import Prefixed
from subquad.kernels.state import commit
from subquad.kernels.wrapping import by_sequence, full_precision, sequence_op


@sequence_op
def short_conv(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, "D"] | None = None,
    *,
    activation: str | None = None,
    state: Float[Tensor, "N P D"] | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "N P D"] | None]:
    """y_t = act(bias + sum_w weight[:, w] * x_{t - (W-1) + w}), with zeros before the first token.

    activation: None or "silu". state: the last W-1 inputs, [N, W-1, D]. Returns (y in x's dtype, the new state or
        None).
    Cost: O(T D W); D (W-1) values of state.
    """
    if activation not in (None, "silu"):
        raise UserError(f"short_conv: activation is None or 'silu', not {activation!r}")
    if weight.shape[0] != x.shape[2]:
        raise UserError(f"short_conv: weight is [{x.shape[2]}, W] for x {tuple(x.shape)}; got {tuple(weight.shape)}")
    form = pick("short_conv", _FORMS, x)
    with full_precision(x):
        y, last = form(x, weight, bias, state, cu_seqlens, activation)
    return y, None if state is None else commit(state, last)


@sequence_op
def shift(
    x: Float[Tensor, "B T D"],
    *,
    state: Float[Tensor, "N 1 D"] | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "N 1 D"] | None]:
    """y_t = x_{t-1} within each sequence, zero (or the carried input) at its start; state: the last input [N, 1, D]."""
    y, last = pick("shift", _SHIFTS, x)(x, None, None, state, cu_seqlens, None)
    return y, None if state is None else commit(state, last)


def _prepared(form):
    """A form in plain torch: everything in x's dtype, zeros for no state, the activation afterwards."""

    def run(x, weight, bias, state, cu_seqlens, activation):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        y, last = form(x, weight, bias, _before(x, state, weight.shape[1] - 1, cu_seqlens), cu_seqlens)
        return F.silu(y) if activation == "silu" else y, last

    return run


def _before(x, state, width, cu_seqlens):
    if state is not None:
        return state.to(x.dtype)
    return x.new_zeros(x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1, width, x.shape[2])


def _naive(x, weight, bias, before, cu_seqlens):
    if cu_seqlens is not None:
        return by_sequence(lambda x, before: _naive(x, weight, bias, before, None), [x], [before], cu_seqlens)
    W = weight.shape[1]
    buffer = torch.cat([before, x], 1)
    outs = [(buffer[:, t : t + W] * weight.T).sum(1) for t in range(x.shape[1])]
    y = torch.stack(outs, 1) if outs else torch.zeros_like(x)
    return y if bias is None else y + bias, buffer[:, buffer.shape[1] - W + 1 :]


def _shifted(x, weight, bias, before, cu_seqlens):
    """W shifted multiply-adds: on a CPU faster than the library's depthwise convolution, which wants channels first."""
    if x.shape[1] == 1 and cu_seqlens is None:  # one product and one sum, fewer calls than a step a tap
        return _naive(x, weight, bias, before, None)
    rows = Prefixed(x.shape[1], weight.shape[1] - 1, cu_seqlens)
    buffer = rows.join(before, x)
    W, length = weight.shape[1], buffer.shape[1] - weight.shape[1] + 1
    y = buffer[:, :length] * weight[:, 0]
    if bias is not None:
        y = y + bias
    for w in range(1, W):
        y = torch.addcmul(y, buffer[:, w : w + length], weight[:, w])
    if cu_seqlens is not None:  # `new` picks by buffer row, whose output stands W-1 rows earlier
        y = F.pad(y, (0, 0, W - 1, 0))
        y = rows.new(y)
    return y, rows.last(buffer)


def _shift(x, weight, bias, state, cu_seqlens, activation):
    before = _before(x, state, 1, cu_seqlens)
    if cu_seqlens is None:
        buffer = torch.cat([before, x], 1)
        return buffer[:, :-1], buffer[:, -1:]
    rows = Prefixed(x.shape[1], 1, cu_seqlens)
    buffer = rows.join(before, x)
    return rows.new(F.pad(buffer[:, :-1], (0, 0, 1, 0))), rows.last(buffer)


def _triton(*args):
    from subquad.kernels.triton.short_conv import form

    return form(*args)


_FORMS = register("short_conv", naive=_prepared(_naive), torch=_prepared(_shifted), triton=_triton)
_SHIFTS = {"naive": _shift, "torch": _shift, "triton": _triton}  # to the Triton form a convolution without weights
