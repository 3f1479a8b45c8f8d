"""The Triton form of `delta_rule`: chunks prepared side by side, one pass over the states, gradients side by side."""

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.operators import operator
from subquad.kernels.triton.affine import Affine
from subquad.kernels.triton.chunk_gradient import delta_gradient
from subquad.kernels.triton.decayed_rows import new_decayed_rows
from subquad.kernels.triton.launch import side_by_side
from subquad.kernels.triton.prepare import chunk_matrices
from subquad.kernels.triton.prepare_delta import DeltaChunks, delta_scores, prepare_delta
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
from subquad.kernels.triton.tiles import accumulating, in_place, new_state, nothing, sum_heads
from subquad.kernels.triton.wide import n_parts, of_heads, of_values


def form(q, k, v, beta, g, S, cu_seqlens):
    """As subquad.kernels.delta_rule calls it; k, v, beta have the axis of factors, and heads of q and k divide v's."""
    R = v.shape[2]
    if in_place(S) and few(q, cu_seqlens):
        return delta_rule_step_(q, k, v, beta, g, S, cu_seqlens), S
    if (n := n_parts(v.shape[4])) > 1:
        beta, g = of_heads(beta, n, 3), of_heads(g, n, 2)
        return of_values(lambda values, S: form(q, k, values, beta, g, S, cu_seqlens), n, v, S)
    if R > 1:  # a row a factor, of which the first decays and the last is read
        q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, R - 1, 0)).flatten(1, 2)
        if g is not None:
            g = F.pad(g.unsqueeze(2), (0, 0) * (g.dim() - 2) + (0, R - 1)).flatten(1, 2)
        cu_seqlens = None if cu_seqlens is None else cu_seqlens * R
    k, v, beta = k.flatten(1, 2), v.flatten(1, 2), beta.flatten(1, 2)
    q, k = q.to(v.dtype), k.to(v.dtype)  # norms leave them in float32 under autocast; products round them anyway
    if in_place(S):
        out, last = delta_rule_triton_(q, k, v, beta, g, S, cu_seqlens), S
    else:
        keep = differentiated(q, k, v, beta, g, S)
        out, last = delta_rule_triton(q, k, v, beta, g, accumulating(S), cu_seqlens, keep)[:2]
    return out[:, R - 1 :: R], last


@operator("delta_rule_step_", mutates_args=("S",))
@taped
def delta_rule_step_(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """A few tokens, the new state written into S."""
    return step(q, k, v, g, S, beta=beta, cu_seqlens=cu_seqlens, last=S)[0]


@delta_rule_step_.register_fake
def _(q, k, v, beta, g, S, cu_seqlens):
    return torch.empty_like(v[:, :, 0], memory_format=torch.contiguous_format)


@operator("delta_rule_triton")
@taped
def delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor | None, cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """(out [B, T, H, V], the new state, empty unless one was given; if `keep`, what the gradients need).

    Without a decay for every channel they prepare the chunks once more, which costs less than it takes memory.
    """
    last = new_state(S, v)
    u, states = writes_and_states(v, q.shape[3], cu_seqlens) if keep else (None, None)
    out, found, sums = _forward(q, k, v, beta, g, S, cu_seqlens, last, u, states)
    if not keep:
        return out, last, *nothing(v, 10)
    if sums is None:
        return out, last, u, states, *nothing(v, 8)
    rows = (found.Q, found.R, found.F)
    return out, last, u, states, found.T, found.P, *rows, found.removal, found.whole, sums


@operator("delta_rule_triton_", mutates_args=("S",))
@taped
def delta_rule_triton_(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """The same, with the new state written into S."""
    return _forward(q, k, v, beta, g, S, cu_seqlens, S)[0]


@delta_rule_triton.register_fake
def _(q, k, v, beta, g, S, cu_seqlens, keep):
    out, last = torch.empty_like(v, memory_format=torch.contiguous_format), new_state(S, v)
    if not keep:
        return out, last, *nothing(v, 10)
    kept = writes_and_states(v, q.shape[3], cu_seqlens)
    if g is None or g.dim() == 3:
        return out, last, *kept, *nothing(v, 8)
    H, n = v.shape[2], n_chunks(v, cu_seqlens)
    *rows, _, _, _, whole, sums = new_decayed_rows(q, k, k, None, H, n)
    matrices = (chunk_matrices(v, n, H) for _ in range(2))
    return out, last, *kept, *matrices, *rows, whole.new_empty(n, H, CHUNK), whole, sums


@delta_rule_triton_.register_fake
def _(q, k, v, beta, g, S, cu_seqlens):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _forward(q, k, v, beta, g, S, cu_seqlens, last, u=None, states=None):
    """(out, the chunks as they were prepared, the sums of a decay for every channel or None)"""
    out, last = torch.empty_like(v, memory_format=torch.contiguous_format), None if S is None else last
    with side_by_side():
        chunks = cut(v, cu_seqlens, CHUNK)
        scores = delta_scores(q, k, g, chunks) if g is not None and g.dim() == 4 else None
        found = prepare_delta(q, k, beta, g if scores is None else scores, chunks)
        sums = None if scores is None else scores.rows.sums
        del scores
        run = Affine(v, **found.forward(), cu_seqlens=cu_seqlens)
        run.run(run.states(S, last), out, u=u, states=states, last=last)
    return clear_padding(out, cu_seqlens), found, sums


@operator("delta_rule_triton_backward")
@taped
def delta_rule_triton_backward(
    do: Tensor, dS: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor | None,
    cu_seqlens: Tensor | None, u: Tensor, states: Tensor, T: Tensor, P: Tensor, q_since: Tensor, k_since: Tensor,
    k_until: Tensor, removal: Tensor, whole: Tensor, sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, g, S; empty where there is none. From u on: as forward kept them."""
    e, d_states, dS0 = torch.empty_like(u), chunk_states(do, q.shape[3], cu_seqlens), new_state(S, v)
    with side_by_side():
        chunks = cut(v, cu_seqlens, CHUNK)
        if g is None or g.dim() == 3:
            found = prepare_delta(q, k, beta, g, chunks, back=True)
        else:
            found = DeltaChunks(T, P, q_since, k_since, k_until, q_since, removal, whole)
        back = Affine(do, **found.backward(), cu_seqlens=cu_seqlens, reverse=True)
        first = None if S is None else dS0
        back.run(back.states(dS, first), u=e, states=d_states, last=first)
        del found, back

        dq, dk, dv, dbeta, dg = delta_gradient(q, k, v, beta, g, sums, whole, do, u, e, states, d_states, chunks)
    for x in (dq, dk, dv, dbeta, dg):
        clear_padding(x, cu_seqlens)
    G = q.shape[2]
    return sum_heads(dq, G), sum_heads(dk, G), dv, dbeta, new_state(g, v) if dg is None else dg, dS0


@delta_rule_triton_backward.register_fake
def _(do, dS, q, k, v, beta, g, S, cu_seqlens, *kept):
    dg, dS0 = new_state(g, v), new_state(S, v)
    same = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta))
    return (*same, dg, dS0)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1], *output[2:])


def _backward(ctx, do, dS, *_):
    q, k, v, beta, g, S, cu_seqlens, *kept = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dS = None if S is None else accumulating(dS)
    found = delta_rule_triton_backward(do, dS, q, k, v, beta, g, S, cu_seqlens, *kept)
    inputs = (q, k, v, beta, g, S)
    return (*(x if given is not None else None for x, given in zip(found, inputs, strict=True)), None, None)


delta_rule_triton.register_autograd(_backward, setup_context=_save)
delta_rule_triton_backward.once_differentiable("delta_rule")
