# ruff: noqa: RUF005 (kernels cannot unpack into a tuple)
"""running_max: time cut into blocks of a few rows that run side by side, for gates that have few channels.

What a block does to what comes before it is m -> max(m + decay, peak); a scan over the blocks' maps gives what each
starts from, and a second pass writes the rows. No sum is longer than what stands between two rows that matter: a map
after a sequence's start has the decay -inf. Backwards h, what flows from row t to row t-1, goes through the blocks in
the same way by h -> gain h + own.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.operators import operator
from subquad.kernels.triton.launch import cdiv, kernel, power_of_2
from subquad.kernels.triton.spans import row_spans, span_of
from subquad.kernels.triton.tape import taped
from subquad.kernels.triton.tiles import rows

# rows: of a block; unroll: loaded together; block: channels of a program; channels: of a thread. A batch of up to
# STEP's rows is one block.
FORWARD = {"rows": 32, "unroll": 8, "block": 128, "channels": 1}
STEP = {"rows": 8, "unroll": 8, "block": 128, "channels": 1}
BACKWARD = {"rows": 32, "unroll": 4, "block": 128, "channels": 1}
CARRY = {"TILE": 64, "block": 16, "num_warps": 4}  # blocks scanned at once


@triton.jit
def _then_max(decay1, peak1, decay2, peak2):
    return decay1 + decay2, tl.maximum(peak1 + decay2, peak2)


@triton.jit
def _then_add(gain1, own1, gain2, own2):
    return gain1 * gain2, own1 * gain2 + own2


@triton.jit
def _channels(condition, col, C: tl.constexpr):
    return tl.where(condition, col < C, False)


@kernel(do_not_specialize=["f_b", "i_b", "T"])
def _forward(
    f, f_b, f_t, i, i_b, i_t, initial, initial_n, after, m, last, decays, peaks, spans, T,
    C: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With `m`: the rows, from `after` the blocks before. Without: each block's map, to `decays` and `peaks`."""
    N_BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    blocks = tl.cdiv(T, ROWS)
    place = tl.program_id(0) // N_BLOCKS
    b = place // blocks
    first = (place % blocks) * ROWS
    col = (tl.program_id(0) % N_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    f += b.to(tl.int64) * f_b + first.to(tl.int64) * f_t
    i += b.to(tl.int64) * i_b + first.to(tl.int64) * i_t
    here = place.to(tl.int64) * C + col
    line = (b.to(tl.int64) * T + first) * C + col
    decay = tl.zeros([BLOCK], tl.float32)
    value = decay + float("-inf")
    if after is not None:
        value = tl.load(after + here - C, mask=_channels(first > 0, col, C), other=0.0)
    for group in range(ROWS // UNROLL):
        r = group * UNROLL
        forget, take = (), ()
        for u in tl.static_range(UNROLL):
            mask = _channels(first + r + u < T, col, C)
            forget = forget + (tl.load(f + (r + u) * f_t + col, mask=mask, other=0.0),)
            take = take + (tl.load(i + (r + u) * i_t + col, mask=mask, other=0.0),)
        for u in tl.static_range(UNROLL):
            t = first + r + u
            n, start, end = span_of(spans, t, T, b)
            if spans is not None or u == 0:
                begins = (t == start) & (t < end)
                at = initial + n.to(tl.int64) * initial_n + col
                carried = tl.load(at, mask=_channels(begins, col, C), other=0.0).to(tl.float32)
                value = tl.where(begins, carried, value)
                decay = tl.where(begins, float("-inf"), decay)
            decay = tl.where(t < end, decay + forget[u].to(tl.float32), decay)
            stepped = tl.maximum(value + forget[u].to(tl.float32), take[u].to(tl.float32))
            value = tl.where(t < end, stepped, value)
            if m is not None:
                tl.store(m + line + (r + u) * C, tl.where(t < end, value, 0.0), mask=_channels(t < T, col, C))
    if m is None:
        tl.store(decays + here, decay, mask=col < C)
        tl.store(peaks + here, value, mask=col < C)
    if last is not None:
        tl.debug_barrier()  # `last` may be `initial`
        tl.store(last + b.to(tl.int64) * initial_n + col, value, mask=col < C)


@kernel(do_not_specialize=["blocks"])
def _carry(gains, owns, after, blocks, C: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, MAX: tl.constexpr):
    """What stands after each block (MAX), or, from the end, before it."""
    N_BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    b = tl.program_id(0) // N_BLOCKS
    col = (tl.program_id(0) % N_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, TILE)
    carried = tl.zeros([BLOCK], tl.float32)
    for tile in range(tl.cdiv(blocks, TILE)):
        place = tile * TILE + row if MAX else blocks - 1 - tile * TILE - row
        mask = ((place >= 0) & (place < blocks))[:, None] & (col < C)[None, :]
        at = (b.to(tl.int64) * blocks + place)[:, None] * C + col[None, :]
        if MAX:
            gain = tl.load(gains + at, mask=mask, other=0.0)
            own = tl.load(owns + at, mask=mask, other=float("-inf"))
            gain, own = tl.associative_scan((gain, own), 0, _then_max)
            value = tl.maximum(carried[None, :] + gain, own)
        else:
            gain = tl.load(gains + at, mask=mask, other=1.0)
            own = tl.load(owns + at, mask=mask, other=0.0)
            gain, own = tl.associative_scan((gain, own), 0, _then_add)
            value = carried[None, :] * gain + own
        tl.store(after + at, value, mask=mask)
        carried = tl.sum(tl.where((row == TILE - 1)[:, None], value, 0.0), 0)


@kernel(do_not_specialize=["f_b", "i_b", "dm_b", "T"])
def _backward(
    f, f_b, f_t, i, i_b, i_t, dm, dm_b, dm_t, initial, initial_n, m, dlast, before, df, di, dinitial, gains, owns,
    spans, T, C: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With `df`: the gradients, from what flows back to a block. Without: each block's map, to `gains` and `owns`."""
    N_BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    blocks = tl.cdiv(T, ROWS)
    place = tl.program_id(0) // N_BLOCKS
    b = place // blocks
    first = (place % blocks) * ROWS
    col = (tl.program_id(0) % N_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    f += b.to(tl.int64) * f_b + first.to(tl.int64) * f_t
    i += b.to(tl.int64) * i_b + first.to(tl.int64) * i_t
    dm += b.to(tl.int64) * dm_b + first.to(tl.int64) * dm_t
    here = place.to(tl.int64) * C + col
    line = (b.to(tl.int64) * T + first) * C + col
    gain = tl.full([BLOCK], 1.0, tl.float32)
    h = tl.zeros([BLOCK], tl.float32)
    if before is not None:
        h = tl.load(before + here + C, mask=_channels(first + ROWS < T, col, C), other=0.0)
    for group in range(ROWS // UNROLL):
        r = ROWS - (group + 1) * UNROLL
        forget, take, past, given = (), (), (), ()
        for u in tl.static_range(UNROLL):
            t = first + r + u
            mask = _channels(t < T, col, C)
            forget = forget + (tl.load(f + (r + u) * f_t + col, mask=mask, other=0.0),)
            take = take + (tl.load(i + (r + u) * i_t + col, mask=mask, other=0.0),)
            given = given + (tl.load(dm + (r + u) * dm_t + col, mask=mask, other=0.0),)
            before_it = m + line + (r + u - 1) * C
            past = past + (tl.load(before_it, mask=_channels((t > 0) & (t < T), col, C), other=0.0),)
        for u in tl.static_range(UNROLL - 1, -1, -1):
            t = first + r + u
            n, start, end = span_of(spans, t, T, b)
            m_before = past[u]
            begins = (t == start) & (t < end)
            if spans is not None or u == 0:
                at = initial + n.to(tl.int64) * initial_n + col
                carried = tl.load(at, mask=_channels(begins, col, C), other=0.0).to(tl.float32)
                m_before = tl.where(begins, carried, m_before)
            ends = (t == end - 1) & (t >= start)
            final = tl.load(dlast + n.to(tl.int64) * C + col, mask=_channels(ends, col, C), other=0.0).to(tl.float32)
            kept = m_before + forget[u].to(tl.float32)
            taken = take[u].to(tl.float32)
            share = tl.where(kept > taken, 1.0, tl.where(kept == taken, 0.5, 0.0))  # half each, as torch.maximum
            gradient = given[u].to(tl.float32) + final + tl.where(ends, 0.0, h)
            h = tl.where(t < end, share * gradient, h)
            gain = tl.where(t < end, share * tl.where(ends, 0.0, gain), gain)
            if df is not None:
                mask = _channels(t < T, col, C)
                tl.store(df + line + (r + u) * C, tl.where(t < end, h, 0.0), mask=mask)
                tl.store(di + line + (r + u) * C, tl.where(t < end, gradient - h, 0.0), mask=mask)
                if spans is not None or u == 0:
                    tl.store(dinitial + n.to(tl.int64) * C + col, h, mask=_channels(begins, col, C))
    if df is None:
        tl.store(gains + here, gain, mask=col < C)
        tl.store(owns + here, h, mask=col < C)


def form(f: Tensor, i: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():
        return _max_in_place(f, i, state, cu_seqlens), state
    return _max(f, i, state, cu_seqlens)


@operator("running_max_triton")
@taped
def _max(f: Tensor, i: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    return _launch(f, i, state.contiguous(), last, cu_seqlens), last


@_max.register_fake
def _(f, i, state, cu_seqlens):
    return _out(i), torch.empty_like(state, memory_format=torch.contiguous_format)


@operator("running_max_triton_", mutates_args=("state",))
@taped
def _max_in_place(f: Tensor, i: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    last = state.contiguous()
    m = _launch(f, i, last, last, cu_seqlens)
    if last is not state:
        state.copy_(last)
    return m


@_max_in_place.register_fake
def _(f, i, state, cu_seqlens):
    return _out(i)


def _out(i: Tensor) -> Tensor:
    return torch.empty_like(i, dtype=torch.float32, memory_format=torch.contiguous_format)


def _launch(f, i, state, last, cu_seqlens) -> Tensor:
    """Every m; the new state goes to `last`, which may be the state itself. Both are contiguous."""
    m = _out(i)
    B, T = i.shape[:2]
    C = prod(i.shape[2:])
    if not m.numel():
        last.copy_(state)
        return m
    one_block = cu_seqlens is None and STEP["rows"] >= T
    table = STEP | ({"rows": 1, "unroll": 1} if T == 1 else {}) if one_block else FORWARD
    shape, n_blocks = _tile(table, C)
    places = B * cdiv(T, table["rows"])
    given = [*_rows_of(f, C), *_rows_of(i, C), state, C]
    spans = row_spans(T, cu_seqlens)

    def run(after=None, m=None, last=None, decays=None, peaks=None):
        _forward[(places * n_blocks,)](*given, after, m, last, decays, peaks, spans, T, C=C, **shape)

    if one_block:
        run(m=m, last=last)
        return m
    decays, peaks = m.new_empty(2, places, C)
    run(decays=decays, peaks=peaks)
    run(after=_carried(decays, peaks, B, C, forwards=True), m=m)
    if cu_seqlens is None:
        last.copy_(m[:, -1])
    else:
        ends = m[0].index_select(0, (cu_seqlens[1:].long() - 1).clamp(min=0))
        nonempty = (cu_seqlens.diff() > 0).view(-1, *[1] * (state.dim() - 1))
        last.copy_(torch.where(nonempty, ends.to(state.dtype), state))
    return m


def _carried(gains: Tensor, owns: Tensor, B: int, C: int, *, forwards: bool) -> Tensor:
    after = torch.empty_like(gains)
    block = min(CARRY["block"], power_of_2(C))
    options = {"TILE": CARRY["TILE"], "BLOCK": block, "MAX": forwards, "num_warps": CARRY["num_warps"]}
    _carry[(B * cdiv(C, block),)](gains, owns, after, gains.shape[0] // B, C=C, **options)
    return after


@operator("running_max_triton_backward")
@taped
def _max_backward(
    dm: Tensor, dlast: Tensor, f: Tensor, i: Tensor, state: Tensor, m: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    df, di = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (f, i))
    dstate = dlast.to(state.dtype, memory_format=torch.contiguous_format, copy=True)  # that of empty sequences
    if not m.numel():
        return df, di, dstate
    B, T = i.shape[:2]
    C = prod(i.shape[2:])
    shape, n_blocks = _tile(BACKWARD, C)
    places = B * cdiv(T, BACKWARD["rows"])
    given = [*_rows_of(f, C), *_rows_of(i, C), *_rows_of(dm, C), state.contiguous(), C, m, dlast.contiguous()]
    spans = row_spans(T, cu_seqlens)

    def run(before=None, df=None, di=None, dinitial=None, gains=None, owns=None):
        _backward[(places * n_blocks,)](*given, before, df, di, dinitial, gains, owns, spans, T, C=C, **shape)

    gains, owns = m.new_empty(2, places, C)
    run(gains=gains, owns=owns)
    run(before=_carried(gains, owns, B, C, forwards=False), df=df, di=di, dinitial=dstate)
    return df, di, dstate


@_max_backward.register_fake
def _(dm, dlast, f, i, state, m, cu_seqlens):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (f, i, state))


def _save(ctx, inputs, output):
    f, i, state, cu_seqlens = inputs
    ctx.save_for_backward(f, i, state, output[0], cu_seqlens)


def _gradients(ctx, dm, dlast):
    return *_max_backward(dm, dlast, *ctx.saved_tensors), None


_max.register_autograd(_gradients, setup_context=_save)
_max_backward.once_differentiable("running_max")


def _rows_of(x: Tensor, C: int) -> tuple[Tensor, int, int]:
    """x [B, T, ...] as [B, T, C], with the strides of the first two."""
    x = rows(x.reshape(*x.shape[:2], C))
    return x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1)


def _tile(table: dict[str, int], C: int) -> tuple[dict[str, int], int]:
    """The kernel's options for C channels, and how many blocks of channels those are."""
    block = min(table["block"], power_of_2(C))
    warps = max(1, block // (32 * table["channels"]))
    options = {"ROWS": table["rows"], "UNROLL": table["unroll"], "BLOCK": block, "num_warps": warps}
    return options, cdiv(C, block)
