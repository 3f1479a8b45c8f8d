"""The delta rule with an optional decay: a linear-attention state that overwrites what a key held before."""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.chunked import Query, chunk_size, decayed_products, solve_lower
from subquad.kernels.packing import Chunks
from subquad.kernels.state import accumulator_dtype, commit
from subquad.kernels.wrapping import by_sequence, expand_decay, full_precision, in_pieces, sequence_op, too_wide


@sequence_op
def delta_rule(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T *R G K"],
    v: Float[Tensor, "B T *R H V"],
    beta: Float[Tensor, "B T *R H"],
    decay: Float[Tensor, "..."] | None = None,
    *,
    state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H K V"] | None]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t   (q is not scaled).

    With R factors a token (Siems et al. 2025) the state decays once and takes R writes in order, each
    S <- (I - beta_r k_r k_r^T) S + beta_r k_r v_r^T, and q reads after the last.

    Arguments
        q, k: G heads, where G divides H: heads h of v read q, k of head h // (H / G). The transition contracts while
            beta |k|^2 lies in [0, 2]: pass keys of unit length.
        k, v, beta: may have an axis of R factors after T, all three alike.
        beta: write strength, 0 <= beta < 2 (above 1 the transition has negative eigenvalues).
        decay: the log decay g <= 0, finite: None, [H] or [H, K] (constant), [B, T, H] or [B, T, H, K].
        state: S [N, H, K, V]; None starts from zero.
        cu_seqlens: [N+1] boundaries of sequences packed in one row.

    Returns (o [B, T, H, V] in v's dtype, the new state or None). Everything accumulates in float32 or wider.
    Cost: O(T R H (K V + C (K + V))) to train with chunks of C, O(R H K V) a decoded token, state H K V.
    """
    if v.dim() == 4:
        k, v, beta = k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2)
    H, G = v.shape[3], q.shape[2]
    if H % G:
        raise UserError(f"delta_rule: {G} heads of q and k do not divide the {H} heads of v")
    form = pick("delta_rule", _FORMS, v, too_wide(q))
    with full_precision(v):
        out, last = form(q, k, v, beta, expand_decay(decay, v[:, :, 0]), state, cu_seqlens)
    return out, None if state is None else commit(state, last)


def _in_torch(recurrence):
    """The form around a recurrence on tensors of the accumulator's type, with q and k for every head."""

    def form(q, k, v, beta, g, S, cu_seqlens):
        dtype, repeat = accumulator_dtype(v.dtype), v.shape[3] // q.shape[2]
        n_seqs = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if S is None:
            S = v.new_zeros(n_seqs, v.shape[3], q.shape[-1], v.shape[-1], dtype=dtype)
        if repeat > 1:
            q, k = q.repeat_interleave(repeat, 2), k.repeat_interleave(repeat, 3)
        out, last = recurrence(*(x.to(dtype) for x in (q, k, v, beta)), g, S.to(dtype), cu_seqlens)
        return out.to(v.dtype), last

    return form


def _triton(*arguments):
    from subquad.kernels.triton.delta_rule import form

    return form(*arguments)


def _naive(q, k, v, beta, g, S, cu_seqlens):
    """The recurrence as written; k, v, beta have the axis of factors."""
    if cu_seqlens is not None:
        return by_sequence(partial(_naive, cu_seqlens=None), [q, k, v, beta, g], [S], cu_seqlens)
    outs = []
    for t in range(v.shape[1]):
        if g is not None:
            S = S * (g[:, t, :, None, None] if g.dim() == 3 else g[:, t, :, :, None]).exp()
        for r in range(v.shape[2]):
            k_r = k[:, t, r, :, None]  # [B, H, 1, K]
            write = beta[:, t, r, :, None, None] * (v[:, t, r, :, None] - k_r @ S)
            S = S + k_r.transpose(-1, -2) * write
        outs.append((q[:, t, :, None] @ S).squeeze(2))
    return torch.stack(outs, 1) if outs else torch.zeros_like(v[:, :, 0]), S


def _chunked(q, k, v, beta, g, S, cu_seqlens):
    """The WY form (Yang et al. 2024, "Parallelizing linear transformers with the delta rule"), with decays.

    Within a chunk S_i = exp(G_i) S_0 + sum_{j<=i} exp(G_i - G_j) k_j u_j^T, and the writes u solve the unit lower
    triangular system (I + A) U = beta V - beta exp(G) K S_0 with A_ij = beta_i k_i . (exp(G_i - G_j) * k_j), j < i.
    R factors are R rows of a chunk, of which the first decays and the last is read.
    """
    if v.shape[1] <= 1 and cu_seqlens is None:
        return _naive(q, k, v, beta, g, S, None)
    R = v.shape[2]
    if g is not None and g.dim() == 4 and R & (R - 1):  # to a power of two; factors with beta = 0 change nothing
        R = 1 << R.bit_length()
        k, v, beta = (F.pad(x, (0, 0) * (x.dim() - 3) + (0, R - v.shape[2])) for x in (k, v, beta))
    chunks = Chunks(v, max(chunk_size(R * v.shape[1]) // R, 1), cu_seqlens)
    rows = (chunks.split(x).flatten(2, 3).transpose(2, 3) for x in (k, v, beta[..., None]))
    kc, vc, b = (x.contiguous() for x in rows)  # [B, n, H, C, .]
    qc = _spread(chunks.split(q), R - 1, R).transpose(2, 3)
    gc = None if g is None else _spread(chunks.split(g), 0, R)
    ((A,), (P,)), (k_start, q_start), (k_end,), whole = decayed_products([Query(kc), Query(qc, own=True)], [kc], gc)

    right = b * torch.cat([vc, k_start], -1)
    solved = solve_lower(b * A, right)
    # Unbound once: the gradient of each fresh[:, i] would be a zero tensor of the whole, quadratic in T.
    fresh, erase = (x.unbind(1) for x in solved.split([v.shape[-1], k.shape[-1]], -1))
    ends = k_end.transpose(-1, -2).unbind(1)
    wholes = None if whole is None else whole.unbind(1)
    writes = []

    def step(i: int, S: Tensor) -> Tensor:
        u = fresh[i] - erase[i] @ S
        writes.append(u)
        added = ends[i] @ u
        return S + added if wholes is None else torch.addcmul(added, wholes[i], S)

    before, last = chunks.carry(S, step)
    out = q_start @ before
    if writes:
        out = out + P @ torch.stack(writes, 1)
    return chunks.join(out.transpose(2, 3)[:, :, R - 1 :: R]), last


def _spread(x: Tensor, factor: int, R: int) -> Tensor:
    """[B, n, c, ...], a value a token, as [B, n, c R, ...]: in the place of one of its R factors, else zero."""
    if R == 1:
        return x
    return F.pad(x.unsqueeze(3), (0, 0) * (x.dim() - 3) + (factor, R - 1 - factor)).flatten(2, 3)


_FORMS = register("delta_rule", naive=_in_torch(_naive), torch=_in_torch(in_pieces(_chunked, 5)), triton=_triton)
