"""The Triton form of `linear_attention` with a decay for every channel."""

import torch
from torch import Tensor

from subquad.kernels.operators import operator
from subquad.kernels.triton.affine import Affine
from subquad.kernels.triton.chunk_gradient import linear_gradient
from subquad.kernels.triton.launch import side_by_side
from subquad.kernels.triton.prepare_linear import new_linear_chunks, prepare_linear
from subquad.kernels.triton.segments import CHUNK, chunk_states, clear_padding, cut, differentiated, n_chunks
from subquad.kernels.triton.tape import taped
from subquad.kernels.triton.tiles import accumulating, in_place, new_state, nothing, sum_heads


def vector_decay(q, k, v, g, S, exclusive, bonus, cu_seqlens):
    """(out, the new state or None), for g [B, T, H, K]."""
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves some in float32; products round them anyway
    if in_place(S):
        return vector_decay_(q, k, v, g, S, bonus, cu_seqlens, exclusive), S
    keep = differentiated(q, k, v, g, S, bonus)
    return vector_decay_chunked(q, k, v, g, accumulating(S), bonus, cu_seqlens, exclusive, keep)[:2]


@operator("vector_decay_triton")
@taped
def vector_decay_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor | None, bonus: Tensor | None, cu_seqlens: Tensor | None,
    exclusive: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out [B, T, H, V], the new state, empty unless one was given; if `keep`, the states before each chunk and what
    `prepare_linear` found)."""
    last, states = new_state(S, v), chunk_states(v, q.shape[3], cu_seqlens) if keep else None
    out, prepared = _forward(q, k, v, g, S, bonus, cu_seqlens, exclusive, last, states)
    return out, last, *((states, *prepared) if keep else nothing(v, 6))


@operator("vector_decay_triton_", mutates_args=("S",))
@taped
def vector_decay_(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, bonus: Tensor | None, cu_seqlens: Tensor | None,
    exclusive: bool,
) -> Tensor:  # fmt: skip
    """The same, with the new state written into S."""
    return _forward(q, k, v, g, S, bonus, cu_seqlens, exclusive, S)[0]


@vector_decay_chunked.register_fake
def _(q, k, v, g, S, bonus, cu_seqlens, exclusive, keep):
    out, last = torch.empty_like(v, memory_format=torch.contiguous_format), new_state(S, v)
    if not keep:
        return out, last, *nothing(v, 6)
    prepared = new_linear_chunks(q, k, v.shape[2], n_chunks(v, cu_seqlens))
    return out, last, chunk_states(v, q.shape[3], cu_seqlens), *prepared


@vector_decay_.register_fake
def _(q, k, v, g, S, bonus, cu_seqlens, exclusive):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _forward(q, k, v, g, S, bonus, cu_seqlens, exclusive, last, states=None):
    out, last = torch.empty_like(v, memory_format=torch.contiguous_format), None if S is None else last
    with side_by_side():
        prepared = prepare_linear(q, k, g, cut(v, cu_seqlens, CHUNK), exclusive=exclusive, bonus=bonus)
        run = Affine(v, Q=prepared.q_s, P=prepared.P, E=prepared.k_e, whole=prepared.whole, cu_seqlens=cu_seqlens)
        run.run(run.states(S, last), out, states=states, last=last)
    return clear_padding(out, cu_seqlens), prepared


@operator("vector_decay_triton_backward")
@taped
def vector_decay_backward(
    do: Tensor, dS: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor | None, bonus: Tensor | None,
    cu_seqlens: Tensor | None, exclusive: bool, states: Tensor, P: Tensor, q_s: Tensor, k_e: Tensor, whole: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g, S, bonus; empty where there is none. From `states` on: as forward kept them."""
    with side_by_side():
        chunks = cut(v, cu_seqlens, CHUNK)
        back = Affine(do, Q=k_e, P=P, E=q_s, whole=whole, cu_seqlens=cu_seqlens, reverse=True)
        dv, d_states, dS0 = torch.empty_like(v), chunk_states(do, q.shape[3], cu_seqlens), new_state(S, v)
        first = None if S is None else dS0
        back.run(back.states(dS, first), dv, states=d_states, last=first)
        del back

        dq, dk, dg, dbonus = linear_gradient(
            q, k, v, g, sums, whole, do, states, d_states, chunks, exclusive=exclusive, bonus=bonus
        )  # fmt: skip
    for x in (dq, dk, dv, dg):
        clear_padding(x, cu_seqlens)
    G = q.shape[2]
    return sum_heads(dq, G), sum_heads(dk, G), dv, dg, dS0, new_state(None, v) if bonus is None else dbonus


@vector_decay_backward.register_fake
def _(do, dS, q, k, v, g, S, bonus, cu_seqlens, exclusive, *kept):
    same = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g))
    return (*same, new_state(S, v), new_state(bonus, v))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.exclusive, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx, do, dS, *_):
    q, k, v, g, S, bonus, cu_seqlens, *kept = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dS = None if S is None else dS
    found = vector_decay_backward(do, accumulating(dS), q, k, v, g, S, bonus, cu_seqlens, ctx.exclusive, *kept)
    dq, dk, dv, dg, dS0, dbonus = found
    return dq, dk, dv, dg, None if S is None else dS0, None if bonus is None else dbonus, None, None, None


vector_decay_chunked.register_autograd(_backward, setup_context=_save)
vector_decay_backward.once_differentiable("linear_attention")
