"""The gradients of `chunk_gradient`'s formulas under a decay for every channel, for any readers and writers.

    dr_i = sum_{j<=i} (y_i . x_j) D_ij w_j + since_i (S y_i)
    dw_j = sum_{i>=j} (y_i . x_j) D_ij r_i + until_j (dS x_j)

As in `pair_scores` each token is a reader or a writer on a level, so the symmetric matrix of all y . x times one tile
of both gives the gradients of the readers that meet writers there, and of those writers. Lines are the tokens of the
first reader and writer, and then those of the second, where there is one. A program takes some columns of K. One launch
(SINGLE) does the chunks where two products serve all, of readers decayed since the chunk's start and writers grown back
to it (see `decayed_rows`), and another looks for the rest.
"""

import triton
import triton.language as tl

from subquad.kernels.triton.fixed_point import boundary, decay_between, load_stacked, load_sums, store_stacked
from subquad.kernels.triton.launch import kernel
from subquad.kernels.triton.pair_scores import AT_ONCE, LEAST, gentle, least_sums
from subquad.kernels.triton.segments import segment_bounds
from subquad.kernels.triton.tiles import dot, load_tile, store_tile


@triton.jit
def _halves(x, C: tl.constexpr, HALVES: tl.constexpr):
    """[C, columns]: the lines of a token together."""
    if HALVES == 1:
        return x
    return tl.sum(x.reshape(HALVES, C, x.shape[1]), 0)


@triton.jit
def _gradient(
    place,
    # Row tensors [B, T, heads, width] come with their strides; r and w also with how many of our heads share one.
    r1, r1_b, r1_t, r1_h, r1_share,
    r2, r2_b, r2_t, r2_h, r2_share,
    w1, w1_b, w1_t, w1_h, w1_share,
    w2, w2_b, w2_t, w2_h, w2_share,
    y1, y1_b, y1_t, y1_h,
    y2, y2_b, y2_t, y2_h,
    x1, x1_b, x1_t, x1_h,
    x2, x2_b, x2_t, x2_h,
    # the delta rule's write strength [B, T, H]: r2 is w1 there and weighs -beta
    beta, beta_b, beta_t, beta_h,
    # weight [H, K] of a token's own writer in what an exclusive r1 reads
    bonus,
    # cumulated decays and the whole of a chunk; states before and after each; what `chunk_products` made
    sums, whole, states, d_states, pairs, own, n_own,
    # out, contiguous: dr1, dr2, dw1, dw2, dg [B, T, H, K]; dbeta [blocks, B, T, H]; dbonus [n, H, K]
    dr1, dr2, dw1, dw2, dg, dbeta, dbonus,
    table, T, per_sequence, packed, n_rows, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, HALVES: tl.constexpr, EXCLUSIVE1: tl.constexpr, EXCLUSIVE2: tl.constexpr,
    SINGLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    LINES: tl.constexpr = HALVES * C
    DELTA: tl.constexpr = beta is not None
    block = place % N_BLOCKS
    here = (place // N_BLOCKS).to(tl.int64)
    h = (place // N_BLOCKS) % H
    b, start, end, _ = segment_bounds(table, place // (N_BLOCKS * H), T, C, per_sequence, packed)
    col = block * BLOCK_K + tl.arange(0, BLOCK_K)
    sums += here * (C * K)
    at = start.to(tl.int64)
    line = tl.arange(0, LINES)
    row = line % C
    upper = line >= C
    inside = row < end - start
    r1 += b * r1_b + at * r1_t + (h // r1_share) * r1_h
    w1 += b * w1_b + at * w1_t + (h // w1_share) * w1_h
    if HALVES == 2:
        r2 += b * r2_b + at * r2_t + (h // r2_share) * r2_h
    writes = inside
    if w2 is not None:
        w2 += b * w2_b + at * w2_t + (h // w2_share) * w2_h
    elif HALVES == 2:
        writes = inside & (line < C)
    exclusive = tl.where(upper, EXCLUSIVE2, EXCLUSIVE1).to(tl.int32)
    weight = tl.full([LINES], 1.0, tl.float32)  # of the readers
    if DELTA:
        strength = tl.load(beta + b * beta_b + at * beta_t + h * beta_h + row * beta_t, mask=inside, other=0.0)
        strength = strength.to(tl.float32)
        weight = tl.where(upper, -strength, 1.0)

    # The share of the pairs within the chunk.
    met_by = tl.load(pairs + here * LINES * LINES + line[:, None] * LINES + line[None, :])
    reader = load_stacked(r1, r1_t, r2, r2_t, row, upper, inside, col, K)
    writer = load_stacked(w1, w1_t, w2, w2_t, row, upper, writes, col, K)
    read = tl.zeros([LINES, BLOCK_K], tl.float32)
    kept = tl.zeros([LINES, BLOCK_K], tl.float32)
    if SINGLE:
        since = decay_between(load_sums(sums, row - exclusive, col, K), 0)
        back = 1 / decay_between(load_sums(sums, row, col, K), 0)
        near = row[:, None] > row[None, :]
        read += dot(tl.where(near, met_by, 0.0), writer.to(tl.float32) * back, DOT, PRECISION) * since
        near = row[:, None] < row[None, :]
        late = reader.to(tl.float32) * since
        if DELTA:
            late *= weight[:, None]
        kept += dot(tl.where(near, met_by, 0.0), late, DOT, PRECISION) * back
    else:
        for level in range(LEVELS):
            second = (row >> level) % 2 == 1
            seen = load_sums(sums, row - tl.where(second, exclusive, 0), col, K)
            factor = decay_between(seen, load_sums(sums, boundary(row, level), col, K))
            one = tl.where(second[:, None], reader, writer).to(tl.float32) * factor
            if DELTA:
                one *= tl.where(second, weight, 1.0)[:, None]
            near = ((row >> level) ^ 1)[:, None] == (row >> level)[None, :]
            met = dot(tl.where(near, met_by, 0.0), one, DOT, PRECISION) * factor
            read += tl.where(second[:, None], met, 0.0)
            kept += tl.where(second[:, None], 0.0, met)

    # The share of the states.
    y1 += b * y1_b + at * y1_t + h * y1_h
    x1 += b * x1_b + at * x1_t + h * x1_h
    if HALVES == 2:
        y2 += b * y2_b + at * y2_t + h * y2_h
    if w2 is not None:
        x2 += b * x2_b + at * x2_t + h * x2_h
    from_state = tl.zeros([LINES, BLOCK_K], tl.float32)
    to_state = tl.zeros([LINES, BLOCK_K], tl.float32)
    crossing = tl.zeros([BLOCK_K], tl.float32)
    for c in range(0, V, BLOCK_V):
        value = c + tl.arange(0, BLOCK_V)
        S = load_tile(states + here * K * V, V, col, value, col < K, V)
        dS = load_tile(d_states + here * K * V, V, col, value, col < K, V)
        crossing += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        y = load_stacked(y1, y1_t, y2, y2_t, row, upper, inside, value, V)
        x = load_stacked(x1, x1_t, x2, x2_t, row, upper, writes, value, V)
        from_state = tl.dot(y.to(DOT), tl.trans(S).to(DOT), from_state, input_precision=PRECISION)
        to_state = tl.dot(x.to(DOT), tl.trans(dS).to(DOT), to_state, input_precision=PRECISION)
    read += from_state * decay_between(load_sums(sums, row - exclusive, col, K), 0)
    to_state *= decay_between(load_sums(sums, row, col, K), load_sums(sums, tl.full([1], C - 1, tl.int32), col, K))
    kept += to_state

    # A decay stands between all that was written before it and all that is read from it on, or after it.
    reader = reader.to(tl.float32)
    writer = writer.to(tl.float32)
    if DELTA:
        reader *= weight[:, None]
    whole_decay = tl.load(whole + here * K + col, mask=col < K, other=0.0)
    crossing = crossing * whole_decay + tl.sum(writer * to_state, 0)
    found = reader * read
    change = _halves(found - writer * kept, C, HALVES)
    dgate = crossing[None, :] + tl.cumsum(change, 0, reverse=True)
    if EXCLUSIVE1 or EXCLUSIVE2:
        dgate -= _halves(tl.where((exclusive == 1)[:, None], found, 0.0), C, HALVES)
    token = tl.arange(0, C)
    start_line = ((b * T + at) * H + h).to(tl.int64)
    store_tile(dg + start_line * K, H * K, token, col, token < end - start, dgate, K)

    # Each token with itself, which the first reader may read.
    same = tl.load(own + here * C + row, mask=line < C, other=0.0)[:, None]
    if EXCLUSIVE1:
        if bonus is not None:
            own_weight = tl.load(bonus + h * K + col, mask=col < K, other=0.0).to(tl.float32)[None, :]
            tl.store(dbonus + here * K + col, tl.sum(same * reader * writer, 0), mask=col < K)
            read += same * own_weight * writer
            kept += same * own_weight * reader
    else:
        read += same * writer
        kept += same * reader
        if w2 is not None:
            same = tl.load(own + (n_own + here) * C + row)[:, None]
            read += same * load_stacked(w2, w2_t, None, 0, row, upper, inside, col, K).to(tl.float32)
            kept += same * load_stacked(r1, r1_t, None, 0, row, upper == 0, inside, col, K).to(tl.float32)

    out = start_line * K
    if DELTA:
        key = load_stacked(r2, r2_t, None, 0, row, upper == 0, inside, col, K).to(tl.float32)
        strengths = dbeta + block.to(tl.int64) * n_rows * H + start_line + row * H
        tl.store(strengths, -tl.sum(key * read, 1), mask=inside & upper)
        key_grad = _halves(tl.where(upper[:, None], weight[:, None] * read, kept), C, HALVES)
        store_tile(dw1 + out, H * K, token, col, token < end - start, key_grad, K)
        store_stacked(dr1 + out, None, H * K, row, upper, inside, col, read, K)
    else:
        store_stacked(dr1 + out, None if dr2 is None else dr2 + out, H * K, row, upper, inside, col, read, K)
        store_stacked(dw1 + out, None if dw2 is None else dw2 + out, H * K, row, upper, inside, col, kept, K)


@kernel(do_not_specialize=["beta_b", "T", "per_sequence", "packed", "n_rows", "n_places"])
def vector_gradient(
    r1, r1_b, r1_t, r1_h, r1_share, r2, r2_b, r2_t, r2_h, r2_share,
    w1, w1_b, w1_t, w1_h, w1_share, w2, w2_b, w2_t, w2_h, w2_share,
    y1, y1_b, y1_t, y1_h, y2, y2_b, y2_t, y2_h, x1, x1_b, x1_t, x1_h, x2, x2_b, x2_t, x2_h,
    beta, beta_b, beta_t, beta_h, bonus, sums, whole, states, d_states, pairs, own, n_own,
    dr1, dr2, dw1, dw2, dg, dbeta, dbonus, table, T, per_sequence, packed, n_rows, H, n_places,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, HALVES: tl.constexpr, EXCLUSIVE1: tl.constexpr, EXCLUSIVE2: tl.constexpr,
    SINGLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A place is a chunk of a head and some columns: one a program, or those of many that two products do not serve."""
    N_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if SINGLE:
        place = tl.program_id(0)
        _, start, end, _ = segment_bounds(table, place // (N_BLOCKS * H), T, C, per_sequence, packed)
        if end <= start:
            if dbonus is not None:
                here = (place // N_BLOCKS).to(tl.int64)
                col = (place % N_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
                tl.store(dbonus + here * K + col, tl.zeros([BLOCK_K], tl.float32), mask=col < K)
        elif gentle(sums + (place // N_BLOCKS).to(tl.int64) * (C * K), K, C):
            _gradient(
                place, r1, r1_b, r1_t, r1_h, r1_share, r2, r2_b, r2_t, r2_h, r2_share,
                w1, w1_b, w1_t, w1_h, w1_share, w2, w2_b, w2_t, w2_h, w2_share,
                y1, y1_b, y1_t, y1_h, y2, y2_b, y2_t, y2_h, x1, x1_b, x1_t, x1_h, x2, x2_b, x2_t, x2_h,
                beta, beta_b, beta_t, beta_h, bonus, sums, whole, states, d_states, pairs, own, n_own,
                dr1, dr2, dw1, dw2, dg, dbeta, dbonus, table, T, per_sequence, packed, n_rows, H,
                K, V, BLOCK_K, BLOCK_V, C, LEVELS, HALVES, EXCLUSIVE1, EXCLUSIVE2, SINGLE, DOT, PRECISION,
            )  # fmt: skip
    else:
        program = tl.program_id(0)
        programs = tl.num_programs(0)
        turn = tl.arange(0, AT_ONCE)
        for first in range(0, tl.cdiv(n_places - program, programs), AT_ONCE):
            places = program + (first + turn) * programs
            # A chunk without tokens has no decays either.
            least = least_sums(sums, places // N_BLOCKS, n_places // N_BLOCKS, K, C)
            if tl.min(least, 0) < LEAST:
                for i in range(AT_ONCE):
                    if tl.min(tl.where(turn == i, least, 0), 0) < LEAST:
                        _gradient(
                            program + (first + i) * programs,
                            r1, r1_b, r1_t, r1_h, r1_share, r2, r2_b, r2_t, r2_h, r2_share,
                            w1, w1_b, w1_t, w1_h, w1_share, w2, w2_b, w2_t, w2_h, w2_share,
                            y1, y1_b, y1_t, y1_h, y2, y2_b, y2_t, y2_h, x1, x1_b, x1_t, x1_h, x2, x2_b, x2_t, x2_h,
                            beta, beta_b, beta_t, beta_h, bonus, sums, whole, states, d_states, pairs, own, n_own,
                            dr1, dr2, dw1, dw2, dg, dbeta, dbonus, table, T, per_sequence, packed, n_rows, H,
                            K, V, BLOCK_K, BLOCK_V, C, LEVELS, HALVES, EXCLUSIVE1, EXCLUSIVE2, SINGLE, DOT, PRECISION,
                        )  # fmt: skip
