"""The Triton form of `dplr_rule`: chunks prepared side by side, one pass over the states, gradients side by side."""

import torch
from torch import Tensor

from subquad.kernels.operators import operator
from subquad.kernels.triton.affine import Affine
from subquad.kernels.triton.chunk_gradient import dplr_gradient
from subquad.kernels.triton.decayed_rows import new_decayed_rows
from subquad.kernels.triton.launch import side_by_side
from subquad.kernels.triton.prepare import chunk_matrices
from subquad.kernels.triton.prepare_dplr import DplrChunks, dplr_scores, prepare_dplr
from subquad.kernels.triton.segments import (
    CHUNK,
    chunk_states,
    clear_padding,
    cut,
    differentiated,
    n_chunks,
    writes_and_states,
)
from subquad.kernels.triton.step import few, step
from subquad.kernels.triton.tape import taped
from subquad.kernels.triton.tiles import accumulating, in_place, new_state, nothing
from subquad.kernels.triton.wide import n_parts, of_heads, of_values


def form(q, k, v, a, b, g, S, cu_seqlens):
    """As subquad.kernels.dplr_rule calls it. A scalar decay, and none, is one for every channel here."""
    if g is not None and g.dim() == 3:
        g = g[..., None].expand(*g.shape, q.shape[3])
    if in_place(S) and few(q, cu_seqlens):
        return dplr_rule_step_(q, k, v, a, b, g, S, cu_seqlens), S
    if (n := n_parts(v.shape[3])) > 1:
        q, k, a, b, g = (of_heads(x, n, 2) for x in (q, k, a, b, g))
        return of_values(lambda values, S: form(q, k, values, a, b, g, S, cu_seqlens), n, v, S)
    if g is None:
        g = torch.zeros((), device=q.device).expand(q.shape)
    q, k, a, b = (x.to(v.dtype) for x in (q, k, a, b))  # autocast leaves some in float32; products round them anyway
    if in_place(S):
        return dplr_rule_triton_(q, k, v, a, b, g, S, cu_seqlens), S
    keep = differentiated(q, k, v, a, b, g, S)
    return dplr_rule_triton(q, k, v, a, b, g, accumulating(S), cu_seqlens, keep)[:2]


@operator("dplr_rule_step_", mutates_args=("S",))
@taped
def dplr_rule_step_(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, S: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """A few tokens, the new state written into S."""
    return step(q, k, v, g, S, a=a, b=b, cu_seqlens=cu_seqlens, last=S)[0]


@dplr_rule_step_.register_fake
def _(q, k, v, a, b, g, S, cu_seqlens):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@operator("dplr_rule_triton")
@taped
def dplr_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, S: Tensor | None,
    cu_seqlens: Tensor | None, keep: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """(out [B, T, H, V], the new state, empty unless one was given; if `keep`, what the gradients need)."""
    last = new_state(S, v)
    u, states = writes_and_states(v, q.shape[3], cu_seqlens) if keep else (None, None)
    out, found, sums = _forward(q, k, v, a, b, g, S, cu_seqlens, last, u, states)
    return out, last, *((u, states, *found, sums) if keep else nothing(v, 12))


@operator("dplr_rule_triton_", mutates_args=("S",))
@taped
def dplr_rule_triton_(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, S: Tensor, cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same, with the new state written into S."""
    return _forward(q, k, v, a, b, g, S, cu_seqlens, S)[0]


@dplr_rule_triton.register_fake
def _(q, k, v, a, b, g, S, cu_seqlens, keep):
    out, last = torch.empty_like(v, memory_format=torch.contiguous_format), new_state(S, v)
    if not keep:
        return out, last, *nothing(v, 12)
    H, n = v.shape[2], n_chunks(v, cu_seqlens)
    *rows, _, _, whole, sums = new_decayed_rows(q, a, k, b, H, n)
    matrices = (chunk_matrices(v, n, H) for _ in range(4))
    return out, last, *writes_and_states(v, q.shape[3], cu_seqlens), *matrices, *rows, whole, sums


@dplr_rule_triton_.register_fake
def _(q, k, v, a, b, g, S, cu_seqlens):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _forward(q, k, v, a, b, g, S, cu_seqlens, last, u=None, states=None):
    """(out, the chunks as they were prepared, the sums of the decays)"""
    out, last = torch.empty_like(v, memory_format=torch.contiguous_format), None if S is None else last
    with side_by_side():
        chunks = cut(v, cu_seqlens, CHUNK)
        scores = dplr_scores(q, k, a, b, g, chunks)
        found, sums = prepare_dplr(scores, chunks), scores.rows.sums
        del scores
        run = Affine(v, **found.forward(), cu_seqlens=cu_seqlens)
        run.run(run.states(S, last), out, u=u, states=states, last=last)
    return clear_padding(out, cu_seqlens), found, sums


@operator("dplr_rule_triton_backward")
@taped
def dplr_rule_triton_backward(
    do: Tensor, dS: Tensor | None, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor,
    S: Tensor | None, cu_seqlens: Tensor | None, u: Tensor, states: Tensor, T: Tensor, qk: Tensor, qb: Tensor,
    ak: Tensor, q_since: Tensor, a_since: Tensor, k_until: Tensor, b_until: Tensor, whole: Tensor, sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, a, b, g, S; S's empty where there is none. From u on: as forward kept them."""
    with side_by_side():
        chunks = cut(v, cu_seqlens, CHUNK)
        found = DplrChunks(T, qk, qb, ak, q_since, a_since, k_until, b_until, whole)
        back = Affine(do, **found.backward(), cu_seqlens=cu_seqlens, reverse=True)
        e, dv, dS0 = torch.empty_like(u), torch.empty_like(u), new_state(S, v)
        d_states = chunk_states(do, q.shape[3], cu_seqlens)
        first = None if S is None else dS0
        back.run(back.states(dS, first), dv, u=e, states=d_states, last=first)
        del found, back

        dq, dk, da, db, dg = dplr_gradient(q, k, v, a, b, g, sums, whole, do, u, e, states, d_states, chunks)
    for x in (dq, dk, dv, da, db, dg):
        clear_padding(x, cu_seqlens)
    return dq, dk, dv, da, db, dg, dS0


@dplr_rule_triton_backward.register_fake
def _(do, dS, q, k, v, a, b, g, S, cu_seqlens, *kept):
    same = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, a, b, g))
    return (*same, new_state(S, v))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], *output[2:])


def _backward(ctx, do, dS, *_):
    q, k, v, a, b, g, S, cu_seqlens, *kept = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dS = None if S is None else accumulating(dS)
    found = dplr_rule_triton_backward(do, dS, q, k, v, a, b, g, S, cu_seqlens, *kept)
    inputs = (q, k, v, a, b, g, S)
    return (*(x if given is not None else None for x, given in zip(found, inputs, strict=True)), None, None)


dplr_rule_triton.register_autograd(_backward, setup_context=_save)
dplr_rule_triton_backward.once_differentiable("dplr_rule")
