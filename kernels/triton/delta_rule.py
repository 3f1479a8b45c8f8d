"""The Triton form of `delta_rule`: chunks prepared side by side, one pass over the states, gradients side by side."""

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.operators import operator
from subquad.kernels.triton.affine import Affine
from subquad.kernels.triton.chunk_gradient import delta_gradient
from subquad.kernels.triton.pair_scores import Scores, new_scores
from subquad.kernels.triton.prepare_delta import delta_scores, prepare_delta
from subquad.kernels.triton.segments import CHUNK, chunk_states, clear_padding, cut, differentiated, n_chunks
from subquad.kernels.triton.step import few, step
from subquad.kernels.triton.tiles import accumulating, in_place, new_state, sum_heads


def form(q, k, v, beta, g, S, cu_seqlens):
    """As subquad.kernels.delta_rule calls it; k, v, beta have the axis of factors, and heads of q and k divide v's."""
    R = v.shape[2]
    if in_place(S) and few(q, cu_seqlens):
        return delta_rule_step_(q, k, v, beta, g, S, cu_seqlens), S
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
def delta_rule_step_(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """A few tokens, the new state written into S."""
    return step(q, k, v, g, S, beta=beta, cu_seqlens=cu_seqlens, last=S)[0]


@delta_rule_step_.register_fake
def _(q, k, v, beta, g, S, cu_seqlens):
    return torch.empty_like(v[:, :, 0], memory_format=torch.contiguous_format)


@operator("delta_rule_triton")
def delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor | None, cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out [B, T, H, V], the new state, empty unless one was given; if `keep`, what the gradients need)."""
    last, kept = new_state(S, v), _kept(q, v, cu_seqlens, keep)
    out, scores = _forward(q, k, v, beta, g, S, cu_seqlens, last, *(kept if keep else (None, None)))
    return out, last, *kept, *(_present(scores) if keep and scores is not None else _nothing(v))


@operator("delta_rule_triton_", mutates_args=("S",))
def delta_rule_triton_(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """The same, with the new state written into S."""
    return _forward(q, k, v, beta, g, S, cu_seqlens, S)[0]


@delta_rule_triton.register_fake
def _(q, k, v, beta, g, S, cu_seqlens, keep):
    scores = _nothing(v)
    if keep and g is not None and g.dim() == 4:
        scores = _present(new_scores(q, k, k, None, v.shape[2], n_chunks(v, cu_seqlens), torch.float32))
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    return out, new_state(S, v), *_kept(q, v, cu_seqlens, keep), *scores


@delta_rule_triton_.register_fake
def _(q, k, v, beta, g, S, cu_seqlens):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _kept(q, v, cu_seqlens, keep):
    """Room for the writes and for the states before each chunk, which the gradients need."""
    if not keep:
        return new_state(None, v), new_state(None, v)
    return torch.empty_like(v, memory_format=torch.contiguous_format), chunk_states(v, q.shape[3], cu_seqlens)


def _present(scores):
    return tuple(x for x in scores if x is not None)  # there is no second writer


def _nothing(v):
    return tuple(new_state(None, v) for _ in range(6))


def _forward(q, k, v, beta, g, S, cu_seqlens, last, u=None, states=None):
    """(out, the scores under a decay for every channel, or None)"""
    chunks = cut(v, cu_seqlens, CHUNK)
    scores = delta_scores(q, k, g, chunks) if g is not None and g.dim() == 4 else None
    prepared = prepare_delta(q, k, beta, g if scores is None else scores, chunks)
    run = Affine(v, **prepared._asdict(), cu_seqlens=cu_seqlens)
    out, last = torch.empty_like(v, memory_format=torch.contiguous_format), None if S is None else last
    run.run(run.states(S, last), out, u=u, states=states, last=last)
    return clear_padding(out, cu_seqlens), scores


@operator("delta_rule_triton_backward")
def delta_rule_triton_backward(
    do: Tensor, dS: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor | None,
    cu_seqlens: Tensor | None, u: Tensor, states: Tensor, pairs: Tensor, q_since: Tensor, k_since: Tensor,
    k_until: Tensor, whole: Tensor, sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, g, S; empty where there is none. From u on: as forward kept them."""
    chunks = cut(v, cu_seqlens, CHUNK)
    vector = g is not None and g.dim() == 4
    gates = Scores(pairs, q_since, k_since, k_until, None, whole, sums) if vector else g
    prepared = prepare_delta(q, k, beta, gates, chunks, reverse=True)
    back = Affine(do, **prepared._asdict(), cu_seqlens=cu_seqlens, reverse=True)
    e, d_states, dS0 = torch.empty_like(u), chunk_states(do, q.shape[3], cu_seqlens), new_state(S, v)
    first = None if S is None else dS0
    back.run(back.states(dS, first), u=e, states=d_states, last=first)
    del prepared, back

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
    dS = None if S is None else dS
    found = delta_rule_triton_backward(do, dS, q, k, v, beta, g, S, cu_seqlens, *kept)
    inputs = (q, k, v, beta, g, S)
    return (*(x if given is not None else None for x, given in zip(found, inputs, strict=True)), None, None)


delta_rule_triton.register_autograd(_backward, setup_context=_save)
delta_rule_triton_backward.once_differentiable("delta_rule")
