"""The generalised delta rule: a state whose transition is diagonal plus an outer product (RWKV-7)."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subquad.kernels.backend import pick, register
from subquad.kernels.chunked import Query, chunk_size, decayed_products, solve_lower
from subquad.kernels.packing import Chunks
from subquad.kernels.state import accumulator_dtype, commit
from subquad.kernels.wrapping import by_sequence, expand_decay, full_precision, in_pieces, sequence_op, too_wide


@sequence_op
def dplr_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"],
    decay: Float[Tensor, "..."] | None = None,
    *,
    state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H K V"] | None]:
    """S_t = (diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t   (q is not scaled).

    `a` reads the state before it decays. The delta rule is a = exp(g) k, b = -beta k, with beta k in k's place.

    Arguments
        a, b: the low-rank part of the transition, which must not expand the state: RWKV-7 has b = -a * rate with a of
            unit length and rates in [0, 1].
        decay: the log decay g <= 0, finite: None, [H] or [H, K] (constant), [B, T, H] or [B, T, H, K].
        state: S [N, H, K, V]; None starts from zero.
        cu_seqlens: [N+1] boundaries of sequences packed in one row.

    Returns (o [B, T, H, V] in v's dtype, the new state or None). Everything accumulates in float32 or wider.
    Cost: O(T H (K V + C (K + V))) to train with chunks of C, O(H K V) a decoded token, state H K V.
    """
    form = pick("dplr_rule", _FORMS, v, too_wide(q))
    with full_precision(v):
        out, last = form(q, k, v, a, b, expand_decay(decay, v), state, cu_seqlens)
    return out, None if state is None else commit(state, last)


def _in_torch(recurrence):
    """The form around a recurrence on tensors of the accumulator's type."""

    def form(q, k, v, a, b, g, S, cu_seqlens):
        dtype = accumulator_dtype(v.dtype)
        if S is None:
            n_seqs = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            S = v.new_zeros(n_seqs, v.shape[2], q.shape[-1], v.shape[-1], dtype=dtype)
        out, last = recurrence(*(x.to(dtype) for x in (q, k, v, a, b)), g, S.to(dtype), cu_seqlens)
        return out.to(v.dtype), last

    return form


def _triton(*arguments):
    from subquad.kernels.triton.dplr_rule import form

    return form(*arguments)


def _naive(q, k, v, a, b, g, S, cu_seqlens):
    """The recurrence as written."""
    if cu_seqlens is not None:
        return by_sequence(partial(_naive, cu_seqlens=None), [q, k, v, a, b, g], [S], cu_seqlens)
    outs = []
    for t in range(v.shape[1]):
        read = a[:, t, :, None] @ S  # [B, H, 1, V]
        if g is not None:
            S = S * (g[:, t, :, None, None] if g.dim() == 3 else g[:, t, :, :, None]).exp()
        S = S + b[:, t, ..., None] * read + k[:, t, ..., None] * v[:, t, :, None]
        outs.append((q[:, t, :, None] @ S).squeeze(2))
    return torch.stack(outs, 1) if outs else torch.zeros_like(v), S


def _chunked(q, k, v, a, b, g, S, cu_seqlens):
    """Within a chunk S_i = exp(G_i) S_0 + sum_{j<=i} exp(G_i - G_j) (k_j v_j^T + b_j u_j^T) with u_i = S_{i-1}^T a_i.

    What `a` reads therefore solves the unit lower triangular system (I - A_b) U = A_k V + exp(G_{i-1}) A S_0, where A_b
    and A_k hold the decayed products of a_i with b_j and k_j, j < i (as in Peng et al. 2025, appendix).
    """
    if v.shape[1] <= 1 and cu_seqlens is None:
        return _naive(q, k, v, a, b, g, S, None)
    chunks = Chunks(v, chunk_size(v.shape[1]), cu_seqlens)
    qc, kc, vc, ac, bc = (chunks.split(x).transpose(2, 3) for x in (q, k, v, a, b))  # [B, n, H, C, .]
    vc = vc.contiguous()
    readers = [Query(ac, exclusive=True), Query(qc, own=True)]
    products = decayed_products(readers, [kc, bc], None if g is None else chunks.split(g))
    ((a_k, a_b), (q_k, q_b)), (a_start, q_start), (k_end, b_end), whole = products

    solved = solve_lower(-a_b, torch.cat([a_k @ vc, a_start], -1))
    # Unbound once: the gradient of each fresh[:, i] would be a zero tensor of the whole, quadratic in T.
    fresh, old = (x.unbind(1) for x in solved.split([v.shape[-1], k.shape[-1]], -1))
    written = (k_end.transpose(-1, -2) @ vc).unbind(1)
    ends = b_end.transpose(-1, -2).unbind(1)
    wholes = None if whole is None else whole.unbind(1)
    reads = []

    def step(i: int, S: Tensor) -> Tensor:
        u = fresh[i] + old[i] @ S
        reads.append(u)
        added = written[i] + ends[i] @ u
        return S + added if wholes is None else torch.addcmul(added, wholes[i], S)

    before, last = chunks.carry(S, step)
    out = q_start @ before + q_k @ vc
    if reads:
        out = out + q_b @ torch.stack(reads, 1)
    return chunks.join(out.transpose(2, 3)), last


_FORMS = register("dplr_rule", naive=_in_torch(_naive), torch=_in_torch(in_pieces(_chunked, 6)), triton=_triton)
