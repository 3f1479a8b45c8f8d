"""The delta rule with an optional decay: a linear-attention state that overwrites what a key held before."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.chunked import Decay, decayed_scores
from subquad.kernels.packing import Chunks, check_packed
from subquad.kernels.state import accumulator_dtype, commit
from subquad.kernels.wrapping import by_sequence, expand_decay, full_precision


def delta_rule(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    decay: Float[Tensor, "..."] | None = None,
    *,
    state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H K V"] | None]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t   (q is not scaled).

    Arguments
        q, k: G heads, where G divides H: heads h of v read q, k of head h // (H / G). The transition contracts while
            beta |k|^2 lies in [0, 2]: pass keys of unit length.
        beta: write strength, 0 <= beta < 2 (above 1 the transition has negative eigenvalues).
        decay: the log decay g <= 0, finite: None, [H] or [H, K] (constant), [B, T, H] or [B, T, H, K].
        state: S [N, H, K, V]; None starts from zero.
        cu_seqlens: [N+1] boundaries of sequences packed in one row.

    Returns (o [B, T, H, V] in v's dtype, the new state or None). Everything accumulates in float32 or wider.
    Cost: O(T H (K V + C (K + V))) to train with chunks of C, O(H K V) a decoded token, state H K V.
    """
    check_packed(v, cu_seqlens)
    H, G = v.shape[2], q.shape[2]
    if H % G:
        raise UserError(f"delta_rule: {G} heads of q and k do not divide the {H} heads of v")
    form = pick("delta_rule", _FORMS, v)
    dtype = accumulator_dtype(v.dtype)
    with full_precision(v):
        n_seqs = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        S = v.new_zeros(n_seqs, H, q.shape[-1], v.shape[-1], dtype=dtype) if state is None else state.to(dtype)
        q, k, v_, beta = (x.to(dtype) for x in (q, k, v, beta))
        if G != H:
            q, k = q.repeat_interleave(H // G, 2), k.repeat_interleave(H // G, 2)
        out, last = form(q, k, v_, beta, expand_decay(decay, v), S, cu_seqlens)
    return out.to(v.dtype), None if state is None else commit(state, last)


def _naive(q, k, v, beta, g, S, cu_seqlens):
    """The recurrence as written."""
    if cu_seqlens is not None:
        return by_sequence(partial(_naive, cu_seqlens=None), [q, k, v, beta, g], [S], cu_seqlens)
    outs = []
    for t in range(v.shape[1]):
        if g is not None:
            S = S * (g[:, t, :, None, None] if g.dim() == 3 else g[:, t, :, :, None]).exp()
        k_t = k[:, t, :, None]  # [B, H, 1, K]
        write = beta[:, t, :, None, None] * (v[:, t, :, None] - k_t @ S)
        S = S + k_t.transpose(-1, -2) * write
        outs.append((q[:, t, :, None] @ S).squeeze(2))
    return torch.stack(outs, 1) if outs else torch.zeros_like(v), S


def _chunked(q, k, v, beta, g, S, cu_seqlens):
    """The WY form (Yang et al. 2024, "Parallelizing linear transformers with the delta rule"), with decays.

    Within a chunk S_i = exp(G_i) S_0 + sum_{j<=i} exp(G_i - G_j) k_j u_j^T, and the writes u solve the unit lower
    triangular system (I + A) U = beta V - beta exp(G) K S_0 with A_ij = beta_i k_i . (exp(G_i - G_j) * k_j), j < i.
    """
    if v.shape[1] <= 1 and cu_seqlens is None:
        return _naive(q, k, v, beta, g, S, None)
    vector = g is not None and g.dim() == 4
    chunks = Chunks(v, 16 if vector else 64, cu_seqlens)
    qc, kc, vc = (chunks.split(x).transpose(2, 3) for x in (q, k, v))  # [B, n, H, C, .]
    b = chunks.split(beta).transpose(2, 3)[..., None]
    decay = None if g is None else Decay(chunks.split(g), False, v.dtype)
    from_start: Tensor | float = 1.0
    to_end: Tensor | float = 1.0
    if decay is not None:
        from_start, to_end = (x if vector else x[..., None] for x in (decay.from_start, decay.to_end))

    A = b * decayed_scores(kc, kc, decay, strict=True, n_heads=v.shape[2])
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    right = torch.cat([b * vc, b * (kc * from_start)], -1)
    solved = torch.linalg.solve_triangular(A + eye, right, upper=False, unitriangular=True)
    # Unbound once: the gradient of each fresh[:, i] would be a zero tensor of the whole, quadratic in T.
    fresh, erase = (x.unbind(1) for x in solved.split([v.shape[-1], k.shape[-1]], -1))
    k_end = (kc * to_end).transpose(-1, -2).unbind(1)
    whole = None if decay is None else decay.whole.unbind(1)
    writes = []

    def step(i: int, S: Tensor) -> Tensor:
        u = fresh[i] - erase[i] @ S
        writes.append(u)
        added = k_end[i] @ u
        return S + added if whole is None else torch.addcmul(added, whole[i], S)

    before, last = chunks.carry(S, step)
    out = (qc * from_start) @ before
    if writes:
        out = out + decayed_scores(qc, kc, decay, strict=False, n_heads=v.shape[2]) @ torch.stack(writes, 1)
    return chunks.join(out.transpose(2, 3)), last


_FORMS = register("delta_rule", naive=_naive, torch=_chunked)
