"""Time cut into segments that run side by side: their layout, and how states travel from one to the next.

A batch whose heads fill the GPU has one segment a sequence. Otherwise, and in a packed row, whose lengths the host does
not know, each segment first finds what it alone adds to the state, a short pass over the segments turns that into the
state before each, and the real pass starts from there.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.launch import cdiv, kernel

CHUNK = 64  # tokens of a chunk, in every kernel that works in chunks
PROGRAMS = 264  # that run at once: two on each of the 132 multiprocessors of an H100 or H200
SHORTEST = 512  # tokens; below, the states of the segments outweigh their tokens


class Segments(NamedTuple):
    """`count` segments of at most `size` tokens, those of one sequence side by side."""

    count: int
    size: int
    n_seqs: int
    per_sequence: int  # in a batch
    packed: int  # 0 or 1, as the kernels read it
    table: Tensor  # packed: int32 [count, 4]: sequence, start, end, its first chunk; without tokens past the last
    first: Tensor  # packed: int32 [N + 1], the first segment of each sequence
    unread: Tensor  # stands for a float32 pointer that is never followed

    @property
    def whole(self) -> bool:
        """Whether each sequence is one segment, in order."""
        return not self.packed and self.per_sequence == 1


def segments(like: Tensor, cu_seqlens: Tensor | None, programs: int) -> Segments:
    """The layout for `like` [B, T, ...] and a pass of which one segment over all B rows takes `programs` programs.

    As many segments as run at once; fewer than three do not make up for the pass that finds their states.
    """
    T = like.shape[1]
    splits = min(PROGRAMS // max(programs, 1), T // SHORTEST)
    splits = splits if splits > 2 else 1
    size = -(-max(T, 1) // splits)
    return cut(like, cu_seqlens, -(-size // CHUNK) * CHUNK)


def cut(like: Tensor, cu_seqlens: Tensor | None, size: int) -> Segments:
    """Segments of `size` tokens, a multiple of CHUNK; with `size` = CHUNK, the chunks themselves.

    Chunks are numbered b * ceil(T / CHUNK) + i in a batch, and through the sequences in a packed row.
    """
    B, T = like.shape[:2]
    if cu_seqlens is None:
        per_sequence = max(-(-T // size), 1)
        none, unread = _nothing(like.device)
        return Segments(B * per_sequence, size, B, per_sequence, 0, none, none, unread)
    n_seqs = cu_seqlens.numel() - 1
    count = T // size + n_seqs
    cu = cu_seqlens.long()
    lengths = cu.diff()
    ends = ((lengths + size - 1) // size).cumsum(0)
    first, first_chunk = F.pad(ends, (1, 0)), F.pad(((lengths + CHUNK - 1) // CHUNK).cumsum(0), (1, 0))
    index = torch.arange(count, device=cu.device)
    sequence = torch.searchsorted(ends, index, right=True)
    real = sequence < n_seqs
    sequence = sequence.clamp(max=n_seqs - 1)
    within = (index - first[sequence]) * size
    start = torch.where(real, cu[sequence] + within, 0)
    end = torch.where(real, torch.minimum(start + size, cu[sequence + 1]), 0)
    chunk = torch.where(real, first_chunk[sequence] + within // CHUNK, 0)
    table = torch.stack([sequence, start, end, chunk], 1).to(torch.int32)
    return Segments(count, size, n_seqs, 1, 1, table, first.to(torch.int32), table[:0].view(torch.float32))


@cache
def _nothing(device: torch.device) -> tuple[Tensor, Tensor]:
    """What stands for integers and floats that a kernel does not read."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.int32, device=device), torch.empty(0, device=device)


def n_chunks(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many chunks `cut` makes of x [B, T, ...]."""
    B, T = x.shape[:2]
    return B * max(-(-T // CHUNK), 1) if cu_seqlens is None else T // CHUNK + cu_seqlens.numel() - 1


def chunk_states(x: Tensor, K: int, cu_seqlens: Tensor | None) -> Tensor:
    """Room for the states [chunks, H, K, V] before each chunk of x [B, T, H, V]: bfloat16 if x is, else float32."""
    H, V = x.shape[2:]
    return x.new_empty(
        n_chunks(x, cu_seqlens), H, K, V, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    )


def writes_and_states(v: Tensor, K: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for what a delta rule writes [B, T, H, V], and the same."""
    return torch.empty_like(v, memory_format=torch.contiguous_format), chunk_states(v, K, cu_seqlens)


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a gradient of any of these may be asked for, so that what it needs is worth keeping."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@triton.jit
def segment_bounds(table, n, T, segment, per_sequence, packed):
    """Of segment n: its row of the batch (int64), first token, end, and the number of its first chunk."""
    if packed:
        b = 0
        start = tl.load(table + 4 * n + 1)
        end = tl.load(table + 4 * n + 2)
        chunk = tl.load(table + 4 * n + 3)
    else:
        b = n // per_sequence
        start = (n % per_sequence) * segment
        end = tl.minimum(start + segment, T)
        chunk = b * ((T + 63) // 64) + start // 64
    return b.to(tl.int64), start, end, chunk


@kernel(do_not_specialize=["per_sequence", "packed", "carried", "emit"])
def combine(
    alone, total, initial, starts, ends, last, first, per_sequence, packed, carried, emit, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """S before each segment, and after it in `ends`, from what each adds alone and its decay 2^`total`."""
    block = tl.program_id(0)
    n = tl.program_id(1) // H
    h = tl.program_id(1) % H
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < K * V
    lane = (n * H + h).to(tl.int64) * (K * V) + at
    S = tl.load(initial + lane, mask=at < K * V * carried, other=0.0)
    if packed:
        begin = tl.load(first + n)
        stop = tl.load(first + n + 1)
    else:
        begin = n * per_sequence
        stop = begin + per_sequence
    for i in range(stop - begin):
        s = stop - 1 - i if REVERSE else begin + i
        here = (s * H + h).to(tl.int64)
        tl.store(starts + here * (K * V) + at, S, mask=inside)
        added = tl.load(alone + here * (K * V) + at, mask=inside, other=0.0)
        if total is not None:
            S *= tl.exp2(tl.load(total + here))
        S += added
        if ends is not None:
            tl.store(ends + here * (K * V) + at, S, mask=inside)
    tl.store(last + lane, S, mask=at < K * V * emit)


@kernel(do_not_specialize=["n_seqs", "total"])
def _clear(x, cu_seqlens, n_seqs, total, WIDTH, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    used = tl.load(cu_seqlens + n_seqs)
    row = tl.program_id(0) * ROWS
    if row + ROWS > used:
        for i in range(ROWS):
            here = row + i
            if (here >= used) & (here < total):
                for c in range(0, WIDTH, BLOCK):
                    col = c + tl.arange(0, BLOCK)
                    zero = tl.zeros([BLOCK], x.dtype.element_ty)
                    tl.store(x + here.to(tl.int64) * WIDTH + col, zero, mask=col < WIDTH)


def clear_padding(x: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Zero the rows of x [1, T, ...] past the last sequence, in place."""
    if x is not None and cu_seqlens is not None and x.numel():
        width = x[0, 0].numel()
        grid = (cdiv(x.shape[1], 64),)
        _clear[grid](x, cu_seqlens, cu_seqlens.numel() - 1, x.shape[1], width, ROWS=64, BLOCK=1024)
    return x
