"""One to a few tokens without gradients, as in decoding: the state read once, written once, one kernel for every rule.

A program holds the block S [K, BLOCK_V] of one sequence and head and takes the tokens in turn, in float32 and without
matrix products. The rules are those of linear_attention, delta_rule and dplr_rule, as written in their documentation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.configs import config
from subquad.kernels.triton.launch import cdiv, kernel
from subquad.kernels.triton.segments import clear_padding
from subquad.kernels.triton.tiles import load_tile, padded, rows, store_tile


@triton.jit
def _vector(base, lane, WIDTH: tl.constexpr):
    return tl.load(base + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)


@kernel(do_not_specialize=["T", "packed", "carried", "emit"])
def step_pass(
    # rows [B, T, heads, width] with the strides of B, T, heads and the number of our heads that share one of its
    q, q_b, q_t, q_h, q_share,
    # [B, T, R, heads, width]; beta [B, T, R, H]
    k, k_b, k_t, k_r, k_h, k_share,
    v, v_b, v_t, v_r, v_h,
    beta, beta_b, beta_t, beta_r, beta_h,
    a, a_b, a_t, a_h,
    b, b_b, b_t, b_h,
    # log decay [B, T, H] or [B, T, H, K]; bonus [H, K], contiguous
    g, g_b, g_t, g_h, g_k,
    bonus,
    # contiguous: out [B, T, H, V], denominators [B, T, H], states [N, H, K, V] and [N, H, K]
    out, den, s_in, s_out, z_in, z_out,
    cu_seqlens, T, packed, carried, emit, H,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr, EXCLUSIVE: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    block = program % N_BLOCKS
    h = (program // N_BLOCKS) % H
    n = program // (N_BLOCKS * H)
    if packed:
        line = n * 0
        start = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    else:
        line = n
        start = n * 0
        end = start + T
    key = tl.arange(0, BLOCK_K)
    col = block * BLOCK_V + tl.arange(0, BLOCK_V)

    state_at = (n * H + h).to(tl.int64) * K
    S = load_tile(s_in + state_at * V, V, key, col, key < K * carried, V)
    if den is not None:
        first_block = (block == 0).to(tl.int32)
        z = tl.load(z_in + state_at + key, mask=key < K * carried * first_block, other=0.0)
    row = line.to(tl.int64)
    q += row * q_b + (h // q_share) * q_h
    k += row * k_b + (h // k_share) * k_h
    v += row * v_b + h * v_h
    if g is not None:
        g += row * g_b + h * g_h
    if beta is not None:
        beta += row * beta_b + h * beta_h
    if a is not None:
        a += row * a_b + h * a_h
        b += row * b_b + h * b_h
    if bonus is not None:
        own_weight = _vector(bonus + h * K, key, K)

    for i in range(end - start):
        t = (start + i).to(tl.int64)
        at = (row * T + t) * H + h  # of a contiguous [B, T, H]
        reader = _vector(q + t * q_t, key, K)
        if EXCLUSIVE:
            o = tl.sum(reader[:, None] * S, 0)
            if den is not None:
                seen = tl.sum(reader * z, 0)
        if a is not None:
            read = tl.sum(_vector(a + t * a_t, key, K)[:, None] * S, 0)
        if g is not None:
            if VECTOR:
                kept = tl.exp(tl.load(g + t * g_t + key * g_k, mask=key < K, other=0.0).to(tl.float32))
                S *= kept[:, None]
            else:
                kept = tl.exp(tl.load(g + t * g_t).to(tl.float32))
                S *= kept
            if den is not None:
                z *= kept
        for r in tl.static_range(R):
            writer = _vector(k + t * k_t + r * k_r, key, K)
            value = _vector(v + t * v_t + r * v_r, col, V)
            write = value
            if beta is not None:
                strength = tl.load(beta + t * beta_t + r * beta_r).to(tl.float32)
                write = strength * (value - tl.sum(writer[:, None] * S, 0))
            S += writer[:, None] * write[None, :]
            if den is not None:
                z += writer
        if a is not None:
            S += _vector(b + t * b_t, key, K)[:, None] * read[None, :]
        if not EXCLUSIVE:
            o = tl.sum(reader[:, None] * S, 0)
            if den is not None:
                seen = tl.sum(reader * z, 0)
        if bonus is not None:
            o += tl.sum(reader * own_weight * writer, 0) * value
        tl.store(out + at * V + col, o.to(out.dtype.element_ty), mask=col < V)
        if den is not None:
            tl.store(den + at, seen, mask=block == 0)

    store_tile(s_out + state_at * V, V, key, col, key < K * emit, S, V)
    if den is not None:
        tl.store(z_out + state_at + key, z, mask=key < K * emit * first_block)


def few(q: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether tokens are so few that one after the other is fastest: up to eight a sequence, on average if packed."""
    n_seqs = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    return q.shape[1] <= 8 * n_seqs


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, S: Tensor | None = None, *,
    beta: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None, exclusive: bool = False,
    bonus: Tensor | None = None, normalized: bool = False, z: Tensor | None = None, cu_seqlens: Tensor | None = None,
    last: Tensor | None = None, z_last: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(out [B, T, H, V] in v's dtype, denominators [B, T, H] if `normalized`).

    q [B, T, G, K], k [B, T, G, K] and v [B, T, H, V]; the delta rule is told by beta [B, T, H], and k, v and beta may
    then have an axis of R factors after T; dplr_rule by a, b [B, T, H, K]; else it is linear attention. S [N, H, K, V]
    and z [N, H, K] float32, contiguous; None: zeros. The new state goes to `last` and `z_last` if given, which may be
    S and z.
    """
    if v.dim() == 4:
        k, v, beta = k.unsqueeze(2), v.unsqueeze(2), None if beta is None else beta.unsqueeze(2)
    B, T, R, H, V = v.shape
    N, K = B if cu_seqlens is None else cu_seqlens.numel() - 1, q.shape[3]
    q, k, v = rows(q), rows(k), rows(v)
    a, b = (None if x is None else rows(x) for x in (a, b))
    out = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    den = torch.empty(B, T, H, dtype=torch.float32, device=v.device) if normalized else None
    values = config("step", device=v.device, K=K, V=V)
    block = min(values.pop("BLOCK_V"), padded(V))
    programs = N * H * cdiv(V, block)
    if programs:
        some = torch.empty(0, dtype=torch.float32, device=v.device)  # stands for a pointer that is never followed
        step_pass[(programs,)](
            q, *q.stride()[:3], H // q.shape[2], k, *k.stride()[:4], H // k.shape[3], v, *v.stride()[:4],
            *_strided(beta, 4), *_strided(a, 3), *_strided(b, 3), *_strided(g, 4),
            None if bonus is None else bonus.contiguous(), out, den,
            *(some if x is None else x for x in (S, last, z, z_last)),
            some.to(torch.int32) if cu_seqlens is None else cu_seqlens,
            T, int(cu_seqlens is not None), int(S is not None), int(last is not None), H,
            K=K, V=V, R=R, BLOCK_K=padded(K), BLOCK_V=block, VECTOR=g is not None and g.dim() == 4,
            EXCLUSIVE=exclusive, **values,
        )  # fmt: skip
    clear_padding(out, cu_seqlens)
    return out, den if den is None else clear_padding(den, cu_seqlens)


def _strided(x: Tensor | None, n: int):
    """x and its first n strides, those it lacks as zeros."""
    return (None,) + (0,) * n if x is None else (x, *(*x.stride(), 0)[:n])
