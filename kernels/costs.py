"""What a call of an op costs, from the shapes of its arguments.

A formula takes what its op's form takes and gives a `Cost`. FLOPs are additions and multiplications:

products: of the matrix products (and of torch's convolutions) that the torch form makes, two a multiply-add, as torch's
    FLOP counter counts them, which must agree exactly: a complex product counts like a real one, scores above the
    diagonal and the filling of chunks count like all others. Attention to a cache counts all slots of it.
scans: of what the counter does not see: recurrences stepped through, triangular solves, short convolutions and
    transforms (5/2 n log2 n for a real one of length n).
state: bytes of state read and written, as few as the op can do with: of a cache, as if it were full, the new tokens are
    written and the others read, or those of them that are chosen.

Not counted: softmax, exponentials, gates, norms, decays applied to whole chunks, copies, indices. Rows are a batch, not
packed.
"""

from collections.abc import Callable
from inspect import signature
from math import ceil, log2
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels import latent_attention as latent
from subquad.kernels import linformer_attention as linformer
from subquad.kernels import long_conv as convolution
from subquad.kernels import lti as modes
from subquad.kernels import selected_blocks, selective_scan, sparse_attention
from subquad.kernels.attention import QUERY_BLOCK
from subquad.kernels.backend import Call
from subquad.kernels.chunked import chunk_size
from subquad.kernels.norm import dtypes
from subquad.kernels.patterns import LocalBlocks, Window
from subquad.kernels.state import KVCache


class Cost(NamedTuple):
    products: int
    scans: int = 0
    state: int = 0


class Op(NamedTuple):
    """Functions of what the op's forms take."""

    cost: Callable[..., Cost]
    results: Callable[..., Any]  # what a form returns: shapes without values
    inputs: Callable[..., Any]  # the tensors it reads that are no state


OPS: dict[str, Op] = {}
STATES = ("S", "z", "h0", "x0", "m0", "state")  # the formulas' names of states


def cost(call: Call) -> Cost:
    """Of a recorded call."""
    if signature(OPS[call.op].cost).bind(*call.args, **call.kwargs).arguments.get("cu_seqlens") is not None:
        raise UserError(f"{call.op}: the cost of packed rows depends on their lengths, which no formula reads")
    return OPS[call.op].cost(*call.args, **call.kwargs)


def tensor_bytes(call: Call) -> int:
    """Of the inputs and the output, without the state."""
    inputs = pytree.tree_leaves(OPS[call.op].inputs(*call.args, **call.kwargs))
    return _nbytes(*(x for x in inputs if isinstance(x, Tensor)), pytree.tree_leaves(results(call))[0])


def results(call: Call) -> Any:
    """What the call returns, without values: in place of the call itself a layer on the meta device costs no time."""
    return OPS[call.op].results(*call.args, **call.kwargs)


def _formula(
    op: str, results: Callable[..., Any], inputs: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Cost]], Callable[..., Cost]]:
    def declare(cost: Callable[..., Cost]) -> Callable[..., Cost]:
        def stateless(*args: Any, **kwargs: Any) -> list[Any]:
            given = signature(cost).bind(*args, **kwargs).arguments
            return [value for name, value in given.items() if name not in STATES]

        OPS[op] = Op(cost, results, inputs or stateless)
        return cost

    return declare


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(0 if x is None else x.numel() * x.element_size() for x in tensors)


def _heads(q: Tensor, v: Tensor) -> Tensor:
    """An output [B, T, H, V]."""
    return v.new_empty(*q.shape[:3], v.shape[-1])


def _after(q: Tensor, v: Tensor, state: tuple | None) -> Any:
    """The output of attention, and the caches where there is a state."""
    return _heads(q, v) if state is None else (_heads(q, v), *state[:-1])


def _listed(q: Tensor, v: Tensor, state: tuple | None) -> Any:
    return _heads(q, v), None if state is None else list(state[:-1])


# Recurrences with a matrix state. C tokens a chunk, n chunks.


@_formula("linear_attention", lambda q, k, v, g, S, z, has_z, *_: (_heads(v, v), v[..., 0] if has_z else None, S, z))
def _linear_attention(q, k, v, g, S, z, has_z, exclusive, u, cu_seqlens) -> Cost:
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    V, state = V + has_z, 2 * _nbytes(S, z)
    if T <= 1:
        return Cost(2 * B * T * H * K * V, (2 if g is None else 3) * B * T * H * K * V, state)
    C, n = _chunks(T)
    scores = _pairs(g, C, K, H if g is not None and g.dim() == 4 else G)
    return Cost(B * n * (scores + 2 * H * C * C * V + 4 * H * C * K * V), 0, state)


def _chunks(T: int) -> tuple[int, int]:
    C = chunk_size(T)
    return C, ceil(T / C)


def _pairs(g: Tensor | None, C: int, K: int, count: int) -> int:
    """Products of `count` pairs of queries and keys; for a vector decay of the causal pairs alone."""
    return count * (C * (C - 1) * K if g is not None and g.dim() == 4 else 2 * C * C * K)


@_formula("delta_rule", lambda q, k, v, beta, g, S, cu_seqlens: (torch.empty_like(v[:, :, 0]), S))
def _delta_rule(q, k, v, beta, g, S, cu_seqlens) -> Cost:
    (B, T, R, H, V), K = v.shape, q.shape[-1]
    if T <= 1:
        once = B * T * H * K * V
        return Cost(2 * (R + 1) * once, (2 * R + (g is not None)) * once, 2 * _nbytes(S))
    if g is not None and g.dim() == 4 and R & (R - 1):
        R = 1 << R.bit_length()
    tokens = max(chunk_size(R * T) // R, 1)
    C, n = tokens * R, ceil(T / tokens)
    products = _pairs(g, C, K, 2) + 6 * C * K * V + 2 * C * C * V
    return Cost(B * n * H * products, B * n * H * C * (C - 1) * (K + V), 2 * _nbytes(S))


@_formula("dplr_rule", lambda q, k, v, a, b, g, S, cu_seqlens: (torch.empty_like(v), S))
def _dplr_rule(q, k, v, a, b, g, S, cu_seqlens) -> Cost:
    (B, T, H, V), K = v.shape, q.shape[-1]
    if T <= 1:
        once = B * T * H * K * V
        return Cost(4 * once, (4 + (g is not None)) * once, 2 * _nbytes(S))
    C, n = _chunks(T)
    products = _pairs(g, C, K, 4) + 8 * C * K * V + 6 * C * C * V
    return Cost(B * n * H * products, B * n * H * C * (C - 1) * (K + V), 2 * _nbytes(S))


# Elementwise recurrences, convolutions.


@_formula("scan", lambda a, b, h0, cu_seqlens: (torch.empty_like(b), h0))
def _scan(a, b, h0, cu_seqlens) -> Cost:
    return Cost(0, (8 if b.is_complex() else 2) * b.numel(), 2 * _nbytes(h0))


@_formula("running_max", lambda f, i, m0, cu_seqlens: (i.new_empty(i.shape, dtype=m0.dtype), m0))
def _running_max(f, i, m0, cu_seqlens) -> Cost:
    return Cost(0, 2 * i.numel(), 2 * _nbytes(m0))


@_formula("selective_scan", lambda x, dt, A, B, C, h0, cu_seqlens: (torch.empty_like(x), h0))
def _selective_scan(x, dt, A, B, C, h0, cu_seqlens) -> Cost:
    (batch, T, D), N = x.shape, A.shape[1]
    size = min(64, max(8, selective_scan.BLOCK_VALUES // (batch * D * N))) if T > 1 else 1
    return Cost(2 * batch * ceil(T / size) * size * D * N, 3 * batch * T * D * N, 2 * _nbytes(h0))


@_formula("lti", lambda u, A, B, C, P, Q, x0, cu_seqlens: (torch.empty_like(u), x0))
def _lti(u, A, B, C, P, Q, x0, cu_seqlens) -> Cost:
    (batch, T, H), N, low_rank, state = u.shape, A.shape[1], P is not None, 2 * _nbytes(x0)
    if (modes.FEW_LOW_RANK if low_rank else modes.FEW) >= T:
        step = (14 if A.is_complex() else 5) + low_rank * (8 if A.is_complex() else 4)
        return Cost(0, batch * T * H * N * step, state)
    size = 1 << min(modes.LOG_CHUNK, (T - 1).bit_length() // 2)
    n, K, rest, scans = ceil(T / size), 2 * N if A.is_complex() else N, T % size > 0, 0
    products = 2 * size * N * (4 if low_rank else 1)  # responses
    products += 2 * batch * n * (2 * size * K + size * size)
    products += 2 * batch * rest * size * K
    if low_rank:
        products += 4 * size * size + 6 * K * size * size + 2 * K * K * size
        products += 2 * batch * n * K * K + 2 * batch * rest * (size * size + 2 * size * K)
        scans = size * (size - 1)
    return Cost(H * products, H * scans, state)


@_formula(
    "long_conv",
    lambda buffer, filter, count, time: buffer.new_empty(len(buffer), time, buffer.shape[2]),
    lambda buffer, filter, count, time: (buffer[:, :time], filter),
)
def _long_conv(buffer, filter, count, time) -> Cost:
    (batch, S, D), read = buffer.shape, _nbytes(buffer)
    taps = min(S, filter.shape[1])
    if time <= convolution.FEW:
        return Cost(0, 2 * batch * time * taps * D, read)
    size = convolution._transform_length(S + taps - 1)
    return Cost(0, round((2 * batch + 1) * D * 2.5 * size * log2(size)) + 3 * batch * D * size, read)


@_formula("short_conv", lambda x, weight, bias, state, *_: (torch.empty_like(x), state))
def _short_conv(x, weight, bias, state, cu_seqlens, activation) -> Cost:
    return Cost(0, 2 * x.numel() * weight.shape[1], 2 * _nbytes(state))


@_formula("shift", lambda x, weight, bias, state, *_: (torch.empty_like(x), state))
def _shift(x, weight, bias, state, cu_seqlens, activation) -> Cost:
    return Cost(0, 0, 2 * _nbytes(state))


@_formula("norm", lambda x, weight, bias, z, residual, *_: _normed(x, z, residual))
def _norm(x, weight, bias, z, residual, centered, n_groups, silu, gate_first, scale, eps) -> Cost:
    return Cost(0)


def _normed(x: Tensor, z: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    of_total, of_y = dtypes(x, z, residual)
    return torch.empty_like(x, dtype=of_y), torch.empty_like(x, dtype=of_total)


# Softmax attention.


def _softmax(q: Tensor, v: Tensor, pairs: int, K: int | None = None, V: int | None = None) -> int:
    """Two products over `pairs` of a query and a key, for every sequence and head."""
    return 2 * q.shape[0] * q.shape[2] * pairs * ((K or q.shape[-1]) + (V or v.shape[-1]))


def _ring_bytes(T: int, slots: int, *caches: Tensor) -> int:
    """All is read, and the new tokens are written."""
    return _nbytes(*caches) * (slots + min(T, slots)) // max(slots, 1)


@_formula("attention", lambda q, k, v, pattern, sink_logits, state, cu_seqlens: _after(q, v, state))
def _attention(q, k, v, pattern, sink_logits, state, cu_seqlens) -> Cost:
    T, W, sink = q.shape[1], pattern.window, sink_logits is not None
    if state is None:
        if W is not None and W < T:
            return Cost(_softmax(q, v, _band(T, pattern, sink) if pattern.causal else T * (T + sink)))
        return Cost(_softmax(q, v, _staircase(T) + T if sink and pattern.causal else T * (T + sink)))
    slots = state.k.shape[1]
    if isinstance(state, KVCache):
        return Cost(_softmax(q, v, T * (slots + sink)), 0, _nbytes(state.k, state.v))
    moved, spare = _ring_bytes(T, slots, state.k, state.v), slots - pattern.n_sinks - W
    if spare + 1 >= T:
        return Cost(_softmax(q, v, T * (slots + sink)), 0, moved)
    return Cost(_softmax(q, v, _band(T, pattern, sink, carried=True)), 0, moved)


def _band(T: int, pattern: Any, sink: bool, carried: bool = False) -> int:
    size = min(max(32, pattern.window), 128)
    n_sinks = pattern.n_sinks if carried else min(pattern.n_sinks, ceil(T / size) * size)
    return ceil(T / size) * size * (pattern.window - 1 + size + n_sinks + sink)


def _staircase(T: int) -> int:
    """Blocks of queries that read no key past their block."""
    starts = range(0, T, QUERY_BLOCK)
    return sum((min(s + QUERY_BLOCK, T) - s) * min(s + QUERY_BLOCK, T) for s in starts)


@_formula(
    "latent_attention",
    lambda q, q_rope, c, k_rope, w_k, w_v, state, cu_seqlens, expand=None: _after(
        q, w_v[:, :, 0] if expand is None else expand(c.new_zeros(1, c.shape[-1]))[1][0], state
    ),
)
def _latent_attention(q, q_rope, c, k_rope, w_k, w_v, state, cu_seqlens, expand=None) -> Cost:
    (B, T, H, K), P, R = q.shape, q_rope.shape[-1], c.shape[-1]
    V = w_v.shape[1] if expand is None else expand(c.new_zeros(1, R))[1].shape[-1]
    S, moved = (T, 0) if state is None else (state.c.shape[1], _nbytes(state.c, state.k_rope))
    if state is not None and expand is None and latent.absorbs(T, S, R, K, V, P):
        return Cost(2 * B * T * H * (R * (K + V) + S * (2 * R + P)), 0, moved)
    return Cost(2 * B * H * (S * R * (K + V) + T * S * (K + P + max(V, K + P))), 0, moved)


@_formula("linformer_attention", lambda q, k, v, e_k, e_v, causal, state, _: _after(q, v, state))
def _linformer_attention(q, k, v, e_k, e_v, causal, state, cu_seqlens) -> Cost:
    (B, T, H, K), V, (R, C) = q.shape, v.shape[-1], e_k.shape
    summary = 2 * B * R * H * (K + V)  # a token's share
    if not causal:
        return Cost(summary * min(T, C) + _softmax(q, v, T * R))
    if state is None:
        rows, before, held = ceil(T / C) * C, 0, ceil(T / C) * R
        return Cost(summary * rows + _softmax(q, v, _by_blocks(rows, R, C, before, held)))
    held = state.k.shape[1]
    rows, before = max(ceil((T + C - 1) / C), 1) * C, held // R
    pairs = before * R + C if T == 1 else _by_blocks(rows, R, C, before, held)
    moved = _nbytes(state.k, state.v) + _ring_bytes(T, C, state.block_k, state.block_v)
    return Cost(summary * rows + _softmax(q, v, pairs), 0, moved)


def _by_blocks(rows: int, R: int, C: int, before: int, held: int) -> int:
    """Pairs of queries with summaries of earlier blocks and with the keys that are handled at a time."""
    size, pairs = max(1, linformer.QUERIES // C) * C, 0
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        pairs += (stop - start) * (min((before + (stop - 1) // C) * R, held) + stop - start)
    return pairs


@_formula("nystrom_attention", lambda q, k, v, *_: _heads(q, v))
def _nystrom_attention(q, k, v, m, n_iterations, conv, cu_seqlens) -> Cost:
    (B, T, H, K), V = q.shape, v.shape[-1]
    filtered = 0 if conv is None else 2 * B * T * H * V * conv.shape[1]
    if m >= T:
        return Cost(filtered + _softmax(q, v, T * T))
    small = 2 * B * H * (2 * m * T * K + m * m * K + n_iterations * 4 * m**3 + m * m * V)
    return Cost(filtered + small + 2 * _softmax(q, v, m * T))


# Attention in tiles: M tiles of some queries, each over L keys.


def _tiles(rows: int, T: int, span: int, carried: bool, limit: int | None = None) -> int:
    """How many blocks of `span` positions T tokens of `rows` sequences take, from anywhere if carried."""
    most = T if limit is None else min(T, limit)
    return rows * (ceil(most / span) if not carried or span == 1 else (most + span - 2) // span + 1)


def _part(q: Tensor, v: Tensor, part: Any, causal: bool, end: int, carried: bool, heads: list[int]) -> tuple[int, int]:
    """(products of one part, the keys that its tile reads)."""
    B, T = q.shape[:2]
    size, spacing = (1, 1) if T == 1 else part.tile(T)
    M = _tiles(B, T, size * spacing, carried, part.limit()) * spacing
    first, head = (torch.zeros(1, dtype=torch.int64, device="meta") for _ in range(2))
    L = part.keys(head[:, None], first, size, end, causal).shape[-1]
    return 2 * M * len(heads) * size * L * (q.shape[-1] + v.shape[-1]), L


@_formula("sparse_attention", lambda q, k, v, pattern, state, _: _listed(q, v, state))
def _sparse_attention(q, k, v, pattern, state, cu_seqlens) -> Cost:
    T, H = q.shape[1:3]
    if state is None and T <= sparse_attention.SHORT:
        return Cost(_softmax(q, v, T * T))
    near = 0 if state is None else state.k.shape[1]
    far = 0 if state is None else state.far_k.shape[1]
    end = T if state is None else 0 if pattern.far is None else far // pattern.far.width * pattern.far.stride
    products, keys = 0, {False: 0.0, True: 0.0}  # read near and far, by a token and head
    for part in pattern.parts:
        for heads, piece in part.split(H, pattern.causal):
            found, L = _part(q, v, piece, pattern.causal, end, state is not None, heads)
            products += found
            keys[part.far is not None] += L * len(heads) / H
    if state is None:
        return Cost(products)
    slot = _nbytes(state.k, state.v) // max(near, 1)
    written = T if pattern.far is None else T + T * pattern.far.width / pattern.far.stride
    read = min(near, T * keys[False]) + min(far, T * keys[True])
    return Cost(products, 0, round(slot * (read + min(written, near + far))))


@_formula("bucket_attention", lambda q, k, v, bucket, n_buckets, window, state, _: _listed(q, v, state))
def _bucket_attention(q, k, v, bucket, n_buckets, window, state, cu_seqlens) -> Cost:
    (B, T, H, K), V, moved = q.shape, v.shape[-1], 0
    if state is not None:
        caches = _nbytes(state.k, state.v)
        moved = caches * min(T, n_buckets) // n_buckets + caches * min(T, n_buckets * window) // (n_buckets * window)
        if T == 1:
            return Cost(_softmax(q, v, window), 0, moved)
    size = min(max(32, window), 128) if B * T * H > 1 else 1
    tiles = B * T * H // size + (1 if state is None else 2) * B * H * n_buckets
    return Cost(2 * tiles * size * (window - 1 + size) * (K + V), 0, moved)


def _chosen(q: Tensor, v: Tensor, groups: int, chosen: int, blocks: int, size: int) -> int:
    """Products of queries, in groups that choose together, with their blocks, of `blocks` in all."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    pairs = B * T * groups * chosen
    if T > selected_blocks.DIRECT:
        tile = min(64, max(16, B * T * chosen // blocks))
        pairs = (pairs // tile + groups * blocks + 1) * tile
    return 2 * pairs * H // groups * size * (K + V)


def _read_blocks(T: int, tokens: int, slots: int, caches: int) -> int:
    """Bytes of T tokens that each read so many others, at most all, and are written."""
    return caches * min(slots, T * tokens + T) // max(slots, 1)


@_formula("topk_attention", lambda q, k, v, block, top_k, state, _: _listed(q, v, state))
def _topk_attention(q, k, v, block, top_k, state, cu_seqlens) -> Cost:
    (B, T, H, K), G = q.shape, k.shape[2]
    blocks = _tiles(1, T, block, False) if state is None else state.mean.shape[1]
    own, _ = _part(q, v, LocalBlocks(block), True, 0, state is not None, list(range(H)))
    n = min(top_k - 1, blocks)
    products = own + 2 * B * H * T * blocks * K + (_chosen(q, v, H, n, B * blocks, block) if n else 0)
    if state is None:
        return Cost(products)
    read = block * (1 + n * H // G)  # each head chooses for itself
    moved = _read_blocks(T, read, state.k.shape[1], _nbytes(state.k, state.v)) + _nbytes(state.mean)
    return Cost(products, 0, moved)


@_formula("native_sparse_attention", lambda q, k, v, gates, block, top_k, window, state, _: _listed(q, v, state))
def _native_sparse_attention(q, k, v, gates, block, top_k, window, state, cu_seqlens) -> Cost:
    (B, T, H, K), G = q.shape, k.shape[2]
    blocks = _tiles(1, T, block, False) if state is None else state.mean_k.shape[1]
    n = min(top_k, blocks)
    products = _softmax(q, v, T * blocks) + 2 * B * H * T * blocks * K  # the second time for the choice
    products += _chosen(q, v, G, n, B * blocks, block)
    products += _part(q, v, Window(window), True, 0, state is not None, list(range(H)))[0]
    if state is None:
        return Cost(products)
    moved = _read_blocks(T, n * block + window, state.k.shape[1], _nbytes(state.k, state.v))
    return Cost(products, 0, moved + _nbytes(state.mean_k, state.mean_v))


# Experts.


@_formula("grouped_mlp", lambda x, *_: torch.empty_like(x))
def _grouped_mlp(x, expert, weight, weights, act) -> Cost:
    gate_up, down = weights[:2]
    return Cost(2 * expert.numel() * x.shape[1] * (gate_up.shape[1] + down.shape[2]))
