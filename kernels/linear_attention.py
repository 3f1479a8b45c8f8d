"""Linear attention with an optional decay: one op for every layer whose state is a decayed sum of outer products."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.chunked import Decay, Query, chunk_size, decayed_products, decayed_scores
from subquad.kernels.packing import Chunks
from subquad.kernels.state import accumulator_dtype, commit
from subquad.kernels.wrapping import by_sequence, expand_decay, full_precision, in_pieces, sequence_op

LinearState = Tensor | tuple[Tensor, Tensor]


@sequence_op
def linear_attention(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    decay: Float[Tensor, "..."] | None = None,
    *,
    exclusive: bool = False,
    bonus: Float[Tensor, "H K"] | None = None,
    normalizer: float | Float[Tensor, "B T H"] | None = None,
    causal: bool = True,
    state: LinearState | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], LinearState | None]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t   (q is not scaled).

    Arguments
        q, k: G heads, where G divides H: heads h of v read q, k of head h // (H / G).
        decay: the log decay g <= 0, finite: None (no decay), [H] or [H, K] (constant), [B, T, H] or [B, T, H, K].
        exclusive: read before writing, o_t = S_{t-1}^T q_t (RWKV).
        bonus: u, adds (q_t . (u * k_t)) v_t to the output; only with `exclusive`.
        normalizer: divide o_t by max(|z_t . q_t|, normalizer) with z_t = diag(exp(g_t)) z_{t-1} + k_t; a float or one
            floor a token and head. The state is then the pair (S, z).
        causal: False lets every token read the sum over its whole sequence; no decay and no state then.
        state: S [N, H, K, V], or (S [N, H, K, V], z [N, H, K]) with a normaliser; None starts from zero.
        cu_seqlens: [N+1] boundaries of sequences packed in one row.

    Returns (o [B, T, H, V] in v's dtype, the new state or None). Everything accumulates in float32 or wider.
    Cost: O(T H K V) to train, O(H K V) a decoded token, state H K V.
    Second derivatives: the naive form's; elsewhere an error, or autograd's where the form is made of plain torch.
    """
    _check(q, k, v, decay, exclusive, bonus, causal, state, cu_seqlens)
    form = pick("linear_attention", _FORMS, v)
    has_z = normalizer is not None
    S, z = state if isinstance(state, tuple) else (state, None)
    if not causal:
        dtype = accumulator_dtype(v.dtype)
        with full_precision(v):
            out = _bidirectional(q.to(dtype), k.to(dtype), v.to(dtype), normalizer, cu_seqlens)
        return out.to(v.dtype), None
    with full_precision(v):
        g = expand_decay(decay, v)
        out, den, S, z = form(q, k, v, g, S, z, has_z, exclusive, bonus, cu_seqlens)
        if has_z:
            floor = normalizer[..., None].to(den.dtype) if isinstance(normalizer, Tensor) else normalizer
            out = (out / den[..., None].abs().clamp(min=floor)).to(v.dtype)
    if state is None:
        return out, None
    if has_z:
        return out, (commit(state[0], S), commit(state[1], z))
    return out, commit(state, S)


def _check(q, k, v, decay, exclusive, bonus, causal, state, cu_seqlens) -> None:
    H, G = v.shape[2], q.shape[2]
    if H % G:
        raise UserError(f"linear_attention: {G} heads of q and k do not divide the {H} heads of v")
    if bonus is not None and not exclusive:
        raise UserError("linear_attention: bonus weighs the current token, which only exclusive=True leaves out of S")
    if not causal and (decay is not None or exclusive or state is not None):
        raise UserError(
            "linear_attention: causal=False sums whole sequences; it takes no decay, exclusive read or state"
        )


def _in_torch(recurrence):
    """The form around a plain recurrence on tensors of the accumulator's type, of which z is one more column of S."""

    def form(q, k, v, g, S, z, has_z, exclusive, u, cu_seqlens):
        dtype = accumulator_dtype(v.dtype)
        q, k, values = (x.to(dtype) for x in (q, k, v))
        if S is None:
            n_seqs = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            S = values.new_zeros(n_seqs, v.shape[2], q.shape[-1], v.shape[-1])
        S = S.to(dtype)
        if has_z:  # written with ones
            values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
            z = torch.zeros_like(S[..., 0]) if z is None else z.to(dtype)
            S = torch.cat([S, z[..., None]], -1)
        u = None if u is None else u.to(dtype)
        out, last = recurrence(q, k, values, g, S, exclusive, u, cu_seqlens)
        if not has_z:
            return out.to(v.dtype), None, last, None
        return out[..., :-1], out[..., -1], last[..., :-1], last[..., -1]

    return form


def _triton(*arguments):
    from subquad.kernels.triton.linear_attention import form

    return form(*arguments)


def _naive(q, k, v, g, S, exclusive, u, cu_seqlens):
    """The recurrence as written."""
    if cu_seqlens is not None:
        return by_sequence(partial(_naive_batch, exclusive=exclusive, u=u), [q, k, v, g], [S], cu_seqlens)
    return _naive_batch(q, k, v, g, S, exclusive=exclusive, u=u)


def _naive_batch(q, k, v, g, S, *, exclusive, u):
    repeat = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(repeat, 2) if repeat > 1 else x for x in (q, k))
    outs = []
    for t in range(v.shape[1]):
        k_t, v_t = k[:, t], v[:, t]
        q_t = q[:, t, :, None]
        if exclusive:
            o = (q_t @ S).squeeze(2)
            if u is not None:
                o = o + (q[:, t] * u * k_t).sum(-1, keepdim=True) * v_t
        if g is not None:
            S = S * (g[:, t, :, None, None] if g.dim() == 3 else g[:, t, :, :, None]).exp()
        S = S + k_t[..., None] * v_t[..., None, :]
        outs.append(o if exclusive else (q_t @ S).squeeze(2))
    return torch.stack(outs, 1) if outs else torch.zeros_like(v), S


def _chunked(q, k, v, g, S, exclusive, u, cu_seqlens):
    """Within a chunk all pairs at once, between chunks the state (Yang et al. 2024, section 3)."""
    if v.shape[1] <= 1 and cu_seqlens is None:
        return _naive_batch(q, k, v, g, S, exclusive=exclusive, u=u)
    H, G = v.shape[2], q.shape[2]
    vector = g is not None and g.dim() == 4
    if vector and G != H:
        q, k, G = q.repeat_interleave(H // G, 2), k.repeat_interleave(H // G, 2), H
    chunks = Chunks(v, chunk_size(v.shape[1]), cu_seqlens)
    # [B, n, G, C, .] for q and k, [B, n, H, C, .] for v
    qc, kc, vc = (chunks.split(x).transpose(2, 3) for x in (q, k, v))
    if vector:
        reader = Query(qc, exclusive, own=not exclusive)
        ((scores,),), (q_start,), (k_end,), whole = decayed_products([reader], [kc], chunks.split(g))
    else:
        decay = None if g is None else Decay(chunks.split(g), exclusive, v.dtype)
        scores = decayed_scores(qc, kc, decay, strict=exclusive, n_heads=H)
    if u is not None:
        own = (qc * u[:, None] * kc).sum(-1) if G == H else (_heads(qc, H) * u[:, None] * _heads(kc, H)).sum(-1)
        scores = scores + torch.diag_embed(own)
    out = scores @ vc

    # What each chunk adds to the state; heads that share k are one product, with the decay on v's side.
    if vector:
        added = k_end.transpose(-1, -2) @ vc
    else:
        whole = None if decay is None else decay.whole
        scaled = vc if decay is None else vc * decay.to_end[..., None]
        added = _ungroup(kc.transpose(-1, -2) @ _group(scaled, G), H)

    # Unbound once: the gradient of each added[:, i] would be a zero tensor of the whole, quadratic in T.
    added = added.unbind(1)
    wholes = None if whole is None else whole.unbind(1)

    def step(i: int, S: Tensor) -> Tensor:
        return S + added[i] if wholes is None else torch.addcmul(added[i], wholes[i], S)

    before, last = chunks.carry(S, step)
    if vector:
        out = out + q_start @ before
    else:
        read = _ungroup(qc @ _group(before, G), H)
        out = out + (read if decay is None else read * decay.from_start[..., None])
    return chunks.join(out.transpose(2, 3)), last


def _heads(x: Tensor, H: int) -> Tensor:
    return x.repeat_interleave(H // x.shape[2], 2)


def _group(x: Tensor, G: int) -> Tensor:
    """[B, n, H, M, V] -> [B, n, G, M, (H/G) V]: heads that share keys side by side."""
    H = x.shape[2]
    return x if H == G else x.unflatten(2, (G, H // G)).transpose(3, 4).flatten(4)


def _ungroup(x: Tensor, H: int) -> Tensor:
    G = x.shape[2]
    return x if H == G else x.unflatten(4, (H // G, -1)).transpose(3, 4).flatten(2, 3)


def _bidirectional(q, k, v, normalizer, cu_seqlens):
    """Every token reads the sum over its whole sequence."""
    if normalizer is not None:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    H, G = v.shape[2], q.shape[2]
    chunks = Chunks(v, chunk_size(v.shape[1]), cu_seqlens)
    qc, kc, vc = (chunks.split(x).transpose(2, 3) for x in (q, k, v))
    added = _ungroup(kc.transpose(-1, -2) @ _group(vc, G), H)
    if cu_seqlens is None:
        total = added.sum(1, keepdim=True)
    else:
        n_seqs = cu_seqlens.numel() - 1
        sums = added.new_zeros(n_seqs, *added.shape[2:]).index_add(0, chunks.sequence, added[0])
        total = sums[chunks.sequence].unsqueeze(0)
    out = chunks.join(_ungroup(qc @ _group(total, G), H).transpose(2, 3))
    if normalizer is None:
        return out
    floor = normalizer[..., None] if isinstance(normalizer, Tensor) else normalizer
    return out[..., :-1] / out[..., -1:].abs().clamp(min=floor)


_FORMS = register("linear_attention", naive=_in_torch(_naive), torch=_in_torch(in_pieces(_chunked, 4)), triton=_triton)
