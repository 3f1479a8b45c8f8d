"""Which sequence each row of a packed row of sequences belongs to, as the row-by-row kernels read it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.launch import cdiv, kernel


@kernel(do_not_specialize=["T", "n_seqs"])
def _spans(spans, cu_seqlens, T, n_seqs, ROWS: tl.constexpr):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    low = tl.zeros([ROWS], tl.int32)
    high = low + n_seqs
    size = n_seqs
    while size > 0:  # the first sequence that ends after t, by halving
        middle = (low + high) // 2
        ended = tl.load(cu_seqlens + middle + 1, mask=low < high, other=0) <= t
        low, high = tl.where((low < high) & ended, middle + 1, low), tl.where((low < high) & ~ended, middle, high)
        size //= 2
    real = low < n_seqs
    tl.store(spans + t, tl.where(real, low, 0), mask=t < T)
    tl.store(spans + T + t, tl.load(cu_seqlens + low, mask=real, other=0).to(tl.int32), mask=t < T)
    tl.store(spans + 2 * T + t, tl.load(cu_seqlens + low + 1, mask=real, other=0).to(tl.int32), mask=t < T)


def row_spans(time: int, cu_seqlens: Tensor | None) -> Tensor | None:
    """int32 [3, time]: the sequence of each row, its start and its end; 0, 0, 0 for padding. None for a batch."""
    if cu_seqlens is None:
        return None
    spans = torch.empty(3, time, dtype=torch.int32, device=cu_seqlens.device)
    if time:
        _spans[(cdiv(time, 256),)](spans, cu_seqlens.contiguous(), time, cu_seqlens.numel() - 1, ROWS=256)
    return spans


@triton.jit
def span_of(spans, t, T, b):
    """(sequence, start, end) of row t; of padding and of rows outside 0..T-1 the end is at most t."""
    if spans is None:
        n, start, end = b, 0, T
    else:
        inside = (t >= 0) & (t < T)
        n = tl.load(spans + t, mask=inside, other=0)
        start = tl.load(spans + T + t, mask=inside, other=0)
        end = tl.load(spans + 2 * T + t, mask=inside, other=0)
    return n, start, end
