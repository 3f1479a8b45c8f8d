"""What upstream gradients and values [V] of a chunk have to do with each other: the pairs of `chunk_gradient`.

They do not depend on the columns of K, so they are made once, before the gradients of any block of those.
"""

import triton
import triton.language as tl

from subquad.kernels.triton.launch import kernel
from subquad.kernels.triton.prepare import store_matrix
from subquad.kernels.triton.segments import segment_bounds
from subquad.kernels.triton.tiles import cumulated, load_tile, store_tile


@triton.jit
def _add(total, a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), tl.trans(b).to(DOT), total, input_precision=PRECISION)


@triton.jit
def _store_own(base, pairs, row):
    own = tl.sum(tl.where(row[:, None] == row[None, :], pairs, 0.0), 1)
    tl.store(base + row, own)


@triton.jit
def _both_ways(pairs, after):
    pairs = tl.where(after, pairs, 0.0)
    return pairs + tl.trans(pairs)


@kernel(do_not_specialize=["beta_b", "g_b", "blocks", "T", "per_sequence", "packed", "n_rows", "count"])
def chunk_products(
    # [B, T, H, V]
    y1, y1_b, y1_t, y1_h,
    y2, y2_b, y2_t, y2_h,
    x1, x1_b, x1_t, x1_h,
    x2, x2_b, x2_t, x2_h,
    # scalar log decay [B, T, H]
    g, g_b, g_t, g_h,
    # the delta rule's write strength [B, T, H] and values
    beta, beta_b, beta_t, beta_h,
    v, v_b, v_t, v_h,
    # out: the pairs, and own [1 or 2, n, H, C], those of a token with itself; the shares without K of dv [B, T, H, V]
    # and dbeta, the last of its parts [blocks + 1, B, T, H]
    pairs, own, dv, dbeta, blocks,
    table, T, per_sequence, packed, n_rows, count, H,
    V: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    b, start, end, _chunk = segment_bounds(table, n, T, C, per_sequence, packed)
    if end <= start:
        return
    row = tl.arange(0, C)
    inside = row < end - start
    at = start.to(tl.int64)
    line = ((b * T + at) * H + h).to(tl.int64)
    y1 += b * y1_b + at * y1_t + h * y1_h
    x1 += b * x1_b + at * x1_t + h * x1_h
    m11 = tl.zeros([C, C], tl.float32)
    if y2 is not None:
        y2 += b * y2_b + at * y2_t + h * y2_h
        m21 = tl.zeros([C, C], tl.float32)
    if x2 is not None:
        x2 += b * x2_b + at * x2_t + h * x2_h
        m12 = tl.zeros([C, C], tl.float32)
        m22 = tl.zeros([C, C], tl.float32)
    if beta is not None:
        strength = tl.load(beta + b * beta_b + at * beta_t + h * beta_h + row * beta_t, mask=inside, other=0.0)
        strength = strength.to(tl.float32)[:, None]
        v += b * v_b + at * v_t + h * v_h
        dstrength = tl.zeros([C], tl.float32)
    for c in range(0, V, BLOCK_V):
        col = c + tl.arange(0, BLOCK_V)
        y = load_tile(y1, y1_t, row, col, inside, V)
        x = load_tile(x1, x1_t, row, col, inside, V)
        m11 = _add(m11, y, x, DOT, PRECISION)
        if y2 is not None:
            y_second = load_tile(y2, y2_t, row, col, inside, V)
            m21 = _add(m21, y_second, x, DOT, PRECISION)
        if x2 is not None:
            x_second = load_tile(x2, x2_t, row, col, inside, V)
            m12 = _add(m12, y, x_second, DOT, PRECISION)
            m22 = _add(m22, y_second, x_second, DOT, PRECISION)
        if beta is not None:
            value = load_tile(v, v_t, row, col, inside, V).to(tl.float32)
            upstream = y_second.to(tl.float32)
            dstrength += tl.sum(upstream * value, 1)
            store_tile(dv + line * V, H * V, row, col, inside, strength * upstream, V)
    if beta is not None:
        part = blocks * n_rows.to(tl.int64) * H
        tl.store(dbeta + part + line + row * H, dstrength, mask=inside)

    here = tl.program_id(0).to(tl.int64)
    _store_own(own + here * C, m11, row)
    if x2 is not None:
        _store_own(own + (count.to(tl.int64) * H + here) * C, m12, row)
    after = row[:, None] > row[None, :]
    if VECTOR:  # symmetric, [n, H, C, C] or with a second reader [n, H, 2 C, 2 C]
        WIDTH: tl.constexpr = C if y2 is None else 2 * C
        pairs += here * (WIDTH * WIDTH)
        store_matrix(pairs, _both_ways(m11, after), C, WIDTH)
        if y2 is not None:
            m21 = tl.where(after, m21, 0.0)
            if x2 is None:
                store_matrix(pairs + C, tl.trans(m21), C, WIDTH)
                store_matrix(pairs + C * WIDTH, m21, C, WIDTH)
                store_matrix(pairs + C * WIDTH + C, tl.zeros([C, C], tl.float32), C, WIDTH)
            else:
                mixed = m21 + tl.trans(tl.where(after, m12, 0.0))
                store_matrix(pairs + C, tl.trans(mixed), C, WIDTH)
                store_matrix(pairs + C * WIDTH, mixed, C, WIDTH)
                store_matrix(pairs + C * WIDTH + C, _both_ways(m22, after), C, WIDTH)
    else:  # decayed, [n, H, 2, C, C]: of the first reader and of the second
        if g is None:
            weights = tl.where(after, 1.0, 0.0)
        else:
            gate = tl.load(g + b * g_b + at * g_t + h * g_h + row * g_t, mask=inside, other=0.0)
            q_high, q_low, k_high, k_low, _since, _until, _whole = cumulated(gate, False)
            gap = (q_high[:, None] - k_high[None, :]) + (q_low[:, None] - k_low[None, :])
            weights = tl.exp(tl.where(after, gap, float("-inf")))
        pairs += here * (2 * C * C)
        store_matrix(pairs, m11 * weights, C, C)
        store_matrix(pairs + C * C, m21 * weights, C, C)
