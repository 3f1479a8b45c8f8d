"""The Triton form of `linear_attention` with a decay for every channel."""

import torch
from torch import Tensor

from subquad.kernels.operators import operator
from subquad.kernels.triton.affine import Affine
from subquad.kernels.triton.chunk_gradient import linear_gradient
from subquad.kernels.triton.prepare_linear import prepare_linear
from subquad.kernels.triton.segments import CHUNK, chunk_states, clear_padding, cut, differentiated
from subquad.kernels.triton.tiles import accumulating, in_place, new_state, sum_heads


def vector_decay(q, k, v, g, S, exclusive, bonus, cu_seqlens):
    """(out, the new state or None), for g [B, T, H, K]."""
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves some in float32; products round them anyway
    if in_place(S):
        return vector_decay_(q, k, v, g, S, bonus, cu_seqlens, exclusive), S
    keep = differentiated(q, k, v, g, S, bonus)
    return vector_decay_chunked(q, k, v, g, accumulating(S), bonus, cu_seqlens, exclusive, keep)[:2]


@operator("vector_decay_triton")
def vector_decay_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    S: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    exclusive: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, T, H, V], the new state, empty unless one was given; if `keep`, the states before each chunk)."""
    last, states = new_state(S, v), _kept(q, v, cu_seqlens, keep)
    return _forward(q, k, v, g, S, bonus, cu_seqlens, exclusive, last, states if keep else None), last, states


@operator("vector_decay_triton_", mutates_args=("S",))
def vector_decay_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    S: Tensor,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    exclusive: bool,
) -> Tensor:
    """The same, with the new state written into S."""
    return _forward(q, k, v, g, S, bonus, cu_seqlens, exclusive, S)


@vector_decay_chunked.register_fake
def _(q, k, v, g, S, bonus, cu_seqlens, exclusive, keep):
    return torch.empty_like(v, memory_format=torch.contiguous_format), new_state(S, v), _kept(q, v, cu_seqlens, keep)


@vector_decay_.register_fake
def _(q, k, v, g, S, bonus, cu_seqlens, exclusive):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _kept(q, v, cu_seqlens, keep):
    """Room for the states before each chunk, which the gradients need."""
    return chunk_states(v, q.shape[3], cu_seqlens) if keep else new_state(None, v)


def _forward(q, k, v, g, S, bonus, cu_seqlens, exclusive, last, states=None):
    P, readers, writers, whole = prepare_linear(q, k, g, cut(v, cu_seqlens, CHUNK), exclusive=exclusive, bonus=bonus)
    run = Affine(v, Q=readers, P=P, E=writers, whole=whole, cu_seqlens=cu_seqlens)
    out, last = torch.empty_like(v, memory_format=torch.contiguous_format), None if S is None else last
    run.run(run.states(S, last), out, states=states, last=last)
    return clear_padding(out, cu_seqlens)


@operator("vector_decay_triton_backward")
def vector_decay_backward(
    do: Tensor, dS: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor | None, bonus: Tensor | None,
    cu_seqlens: Tensor | None, exclusive: bool, states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g, S, bonus; empty where there is none. states: as forward kept them."""
    chunks = cut(v, cu_seqlens, CHUNK)
    P, readers, writers, whole = prepare_linear(q, k, g, chunks, exclusive=exclusive, bonus=bonus)
    back = Affine(
        do, Q=writers, P=P, E=readers, whole=whole, cu_seqlens=cu_seqlens, reverse=True, P_transposed=True
    )  # fmt: skip
    dv, d_states, dS0 = torch.empty_like(v), back.new_states(), new_state(S, v)
    first = None if S is None else dS0
    back.run(back.states(dS, first), dv, states=d_states, last=first)
    del P, readers, writers, back

    dq, dk, dg, dbonus = linear_gradient(
        q, k, v, g, do, states, d_states, chunks, exclusive=exclusive, bonus=bonus
    )  # fmt: skip
    for x in (dq, dk, dv, dg):
        clear_padding(x, cu_seqlens)
    G = q.shape[2]
    return sum_heads(dq, G), sum_heads(dk, G), dv, dg, dS0, new_state(None, v) if bonus is None else dbonus


@vector_decay_backward.register_fake
def _(do, dS, q, k, v, g, S, bonus, cu_seqlens, exclusive, states):
    same = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g))
    return (*same, new_state(S, v), new_state(bonus, v))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.exclusive, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, do, dS, _):
    q, k, v, g, S, bonus, cu_seqlens, states = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dS = None if S is None else dS
    found = vector_decay_backward(do, dS, q, k, v, g, S, bonus, cu_seqlens, ctx.exclusive, states)
    dq, dk, dv, dg, dS0, dbonus = found
    return dq, dk, dv, dg, None if S is None else dS0, None if bonus is None else dbonus, None, None, None


vector_decay_chunked.register_autograd(_backward, setup_context=_save)
vector_decay_backward.once_differentiable("linear_attention")
