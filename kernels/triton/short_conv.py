# ruff: noqa: RUF005 (kernels cannot unpack into a tuple)
"""short_conv and shift: a few taps over time, every row read once and the rows before it kept in registers.

A program walks a block of channels down a stretch of rows. The backward pass recomputes what stands before the
activation; its sums for the weights go to a row of a small buffer, one a program, added up afterwards in a fixed order.
`weight=None` is the token shift: W = 2, the older tap alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.operators import operator
from subquad.kernels.triton.launch import cdiv, kernel, power_of_2
from subquad.kernels.triton.spans import row_spans, span_of
from subquad.kernels.triton.tape import taped
from subquad.kernels.triton.tiles import rows

# rows: loaded together; block: channels of a program; channels: of a thread; programs: of a backward pass, over which
# the rows are divided, at least `stretch` to each.
FORWARD = {"rows": 16, "block": 128, "channels": 4}
STEP = {"rows": 8, "block": 128, "channels": 1}  # one sequence's whole call, up to `rows` tokens
BACKWARD = {"rows": 4, "block": 256, "channels": 4, "programs": 1024, "stretch": 32}


@triton.jit
def channels(condition, col, D: tl.constexpr):
    """The mask of the channels below D, or of none. (The interpreter makes an integer of `condition & mask`.)"""
    return tl.where(condition, col < D, False)


@triton.jit
def _tap(raw, state, s_n, s_p, spans, n, t, start, end, lag, col, D: tl.constexpr, W: tl.constexpr):
    """x at t - lag of t's own sequence, before whose start stands the state. `raw`: x there, zero before row 0."""
    before = (t - lag < start) & (t < end)
    value = raw.to(tl.float32)
    if spans is not None:
        value = tl.where(before | (t >= end), 0.0, value)
    if state is not None:
        at = state + n.to(tl.int64) * s_n + (W - 1 - lag + t - start) * s_p + col
        value += tl.load(at, mask=channels(before, col, D), other=0.0).to(tl.float32)
    return value


@triton.jit
def _weights(weight, w_d, w_w, col, D: tl.constexpr, W: tl.constexpr):
    values = ()
    if weight is not None:
        for w in tl.static_range(W):
            values = values + (tl.load(weight + col * w_d + w * w_w, mask=col < D, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _bias(bias, col, D: tl.constexpr, BLOCK: tl.constexpr):
    value = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        value += tl.load(bias + col, mask=col < D, other=0.0).to(tl.float32)
    return value


@triton.jit
def _convolved(taps, weights, bias, W: tl.constexpr):
    total = bias
    for w in tl.static_range(W):
        total += taps[w] * weights[w]
    return total


@triton.jit
def _before_silu(dy, pre):
    """The gradient before the activation."""
    s = tl.sigmoid(pre)
    return dy * s * (1 + pre * (1 - s))


@triton.jit
def _keep_last(x, x_t, state, s_n, s_p, last, l_n, l_p, n, start, end, col, D: tl.constexpr, W: tl.constexpr):
    """The last W-1 inputs of sequence n, rows start..end-1 of x. All is read before any is written: `last` may be
    `state`."""
    kept = ()
    for j in tl.static_range(W - 1):
        row = end - (W - 1) + j
        new = row >= start
        value = tl.load(x + row.to(tl.int64) * x_t + col, mask=channels(new, col, D), other=0.0).to(tl.float32)
        if state is not None:
            at = state + n.to(tl.int64) * s_n + (row - start + W - 1) * s_p + col
            value += tl.load(at, mask=channels(row < start, col, D), other=0.0).to(tl.float32)
        kept = kept + (value,)
    tl.debug_barrier()
    for j in tl.static_range(W - 1):
        tl.store(last + n.to(tl.int64) * l_n + j * l_p + col, kept[j], mask=col < D)


@kernel(do_not_specialize=["x_b", "T"])
def _forward(
    x, x_b, x_t, weight, w_d, w_w, bias, state, s_n, s_p, last, l_n, l_p, y, spans, T,
    D: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    stretches = tl.cdiv(T, ROWS)
    place = tl.program_id(0) // N_BLOCKS
    b = place // stretches
    first = (place % stretches) * ROWS
    col = (tl.program_id(0) % N_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    x += tl.multiple_of(b.to(tl.int64) * x_b, ALIGN)
    here = x + first.to(tl.int64) * x_t
    y += (b.to(tl.int64) * T + first) * D

    window = ()  # rows first - (W - 1) .. first + ROWS - 1
    for u in tl.static_range(ROWS + W - 1):
        t = first + (u - (W - 1))
        at = here + (u - (W - 1)) * x_t + col
        window = window + (tl.load(at, mask=channels((t >= 0) & (t < T), col, D), other=0.0),)
    weights = _weights(weight, w_d, w_w, col, D, W)
    offset = _bias(bias, col, D, BLOCK)

    for u in tl.static_range(ROWS):
        t = first + u
        n, start, end = span_of(spans, t, T, b)
        taps = ()
        for w in tl.static_range(W):
            if spans is not None or u < W - 1 - w:
                taps = taps + (_tap(window[u + w], state, s_n, s_p, spans, n, t, start, end, W - 1 - w, col, D, W),)
            else:
                taps = taps + (window[u + w].to(tl.float32),)
        value = taps[0] if weight is None else _convolved(taps, weights, offset, W)
        if SILU:
            value *= tl.sigmoid(value)
        tl.store(y + u * D + col, tl.where(t < end, value, 0.0), mask=channels(t < T, col, D))

    if last is not None:
        _keep_last(x, x_t, state, s_n, s_p, last, l_n, l_p, b, 0, T, col, D, W)


@kernel(do_not_specialize=["x_b", "T"])
def _last(
    x, x_b, x_t, state, s_n, s_p, last, l_n, l_p, cu_seqlens, T, D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if cu_seqlens is None:
        start, end = n * 0, n * 0 + T
        x += n.to(tl.int64) * x_b
    else:
        start, end = tl.load(cu_seqlens + n).to(tl.int32), tl.load(cu_seqlens + n + 1).to(tl.int32)
    _keep_last(x, x_t, state, s_n, s_p, last, l_n, l_p, n, start, end, col, D, W)


@kernel(do_not_specialize=["x_b", "dy_b", "T", "stretch"])
def _backward(
    x, x_b, x_t, dy, dy_b, dy_t, weight, w_d, w_w, bias, state, s_n, s_p, dlast, dx, partial, spans, T, stretch,
    D: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, and this stretch's share of the gradients of weight (W rows) and bias (one more) in `partial`."""
    N_BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    stretches = tl.cdiv(T, stretch)
    place = tl.program_id(0) // N_BLOCKS
    b = place // stretches
    first = (place % stretches) * stretch
    stop = tl.minimum(first + stretch, T)
    col = (tl.program_id(0) % N_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    x += tl.multiple_of(b.to(tl.int64) * x_b, ALIGN) + first.to(tl.int64) * x_t
    dy += tl.multiple_of(b.to(tl.int64) * dy_b, ALIGN) + first.to(tl.int64) * dy_t
    dx += (b.to(tl.int64) * T + first) * D
    weights = _weights(weight, w_d, w_w, col, D, W)
    offset = _bias(bias, col, D, BLOCK)

    past, later, sums = (
        (),
        (),
        (),
    )  # x and the gradient before the activation of the W - 1 rows before; the weights' sums
    for w in tl.static_range(W - 1):
        t = first + (w - (W - 1))
        past = past + (tl.load(x + (w - (W - 1)) * x_t + col, mask=channels(t >= 0, col, D), other=0.0),)
        later = later + (tl.zeros([BLOCK], tl.float32),)
    for _ in tl.static_range(W + 1):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)

    # W - 1 rows past the stretch, whose outputs read its last inputs.
    for group in range(tl.cdiv(stop - first + W - 1, ROWS)):
        gradients = ()
        for u in tl.static_range(ROWS):
            r = group * ROWS + u
            read = channels(first + r < tl.minimum(stop + W - 1, T), col, D)
            past = past + (tl.load(x + r * x_t + col, mask=read, other=0.0),)
            gradients = gradients + (tl.load(dy + r * dy_t + col, mask=read, other=0.0),)
        for u in tl.static_range(ROWS):
            r = group * ROWS + u
            t = first + r
            n, start, end = span_of(spans, t, T, b)
            dp = gradients[u].to(tl.float32)
            if weight is not None:
                taps = ()
                for w in tl.static_range(W):
                    taps = taps + (_tap(past[u + w], state, s_n, s_p, spans, n, t, start, end, W - 1 - w, col, D, W),)
                if SILU:
                    dp = _before_silu(dp, _convolved(taps, weights, offset, W))
                dp = tl.where(t < end, dp, 0.0)
                own = tl.where(t < stop, dp, 0.0)
                added = ()
                for w in tl.static_range(W):
                    added = added + (sums[w] + own * taps[w],)
                sums = added + (sums[W] + own,)
            else:
                dp = tl.where(t < end, dp, 0.0)
            later = later + (dp,)

            # The input W - 1 rows up has met all its outputs.
            target = t - (W - 1)
            n, start, end = span_of(spans, target, T, b)
            value = tl.zeros([BLOCK], tl.float32)
            for w in tl.static_range(W if weight is not None else 1):
                met = later[u + W - 1 - w]
                if spans is not None:
                    met = tl.where(t - w < end, met, 0.0)
                value += met if weight is None else met * weights[w]
            write = (target >= first) & (target < stop)
            if dlast is not None:
                kept = target - (end - (W - 1))
                at = dlast + (n.to(tl.int64) * (W - 1) + kept) * D + col
                value += tl.load(at, mask=channels(write & (kept >= 0) & (target < end), col, D), other=0.0).to(
                    tl.float32
                )
            tl.store(dx + (r - (W - 1)) * D + col, value, mask=channels(write, col, D))
        past, later = past[ROWS:], later[ROWS:]

    if partial is not None:
        partial += place.to(tl.int64) * (W + 1) * D
        for w in tl.static_range(W + 1):
            tl.store(partial + w * D + col, sums[w], mask=col < D)


@kernel(do_not_specialize=["x_b", "dy_b", "T"])
def _state_backward(
    x, x_b, x_t, dy, dy_b, dy_t, weight, w_d, w_w, bias, state, s_n, s_p, dlast, dstate, cu_seqlens, T,
    D: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state meets the first W - 1 outputs, and what of it is left after a short sequence is carried on."""
    n = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if cu_seqlens is None:
        length = n * 0 + T
        x += n.to(tl.int64) * x_b
        dy += n.to(tl.int64) * dy_b
    else:
        start = tl.load(cu_seqlens + n).to(tl.int32)
        length = tl.load(cu_seqlens + n + 1).to(tl.int32) - start
        x += start.to(tl.int64) * x_t
        dy += start.to(tl.int64) * dy_t
    weights = _weights(weight, w_d, w_w, col, D, W)
    offset = _bias(bias, col, D, BLOCK)
    met = ()
    for t in tl.static_range(W - 1):
        dp = tl.load(dy + t * dy_t + col, mask=channels(t < length, col, D), other=0.0).to(tl.float32)
        if SILU:
            taps = ()
            for w in tl.static_range(W):
                if t + w >= W - 1:
                    at, there = x + (t + w - (W - 1)) * x_t + col, t < length
                else:
                    at, there = state + n.to(tl.int64) * s_n + (t + w) * s_p + col, length > 0
                taps = taps + (tl.load(at, mask=channels(there, col, D), other=0.0).to(tl.float32),)
            dp = _before_silu(dp, _convolved(taps, weights, offset, W))
        met = met + (dp,)
    for m in tl.static_range(W - 1):
        left = m - length  # its place in the new state
        at = dlast + (n.to(tl.int64) * (W - 1) + left) * D + col
        value = tl.load(at, mask=channels(left >= 0, col, D), other=0.0).to(tl.float32)
        for w in tl.static_range(m + 1 if weight is not None else 1):
            value += met[m - w] if weight is None else met[m - w] * weights[w]
        tl.store(dstate + (n.to(tl.int64) * (W - 1) + m) * D + col, value, mask=col < D)


def form(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor | None]:
    if state is not None and not torch.is_grad_enabled():
        return _conv_in_place(x, weight, bias, state, cu_seqlens, activation == "silu"), state
    y, last = _conv(x, weight, bias, state, cu_seqlens, activation == "silu")
    return y, None if state is None else last


@operator("short_conv_triton")
@taped
def _conv(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    last = x.new_empty(0) if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    return _launch(x, weight, bias, state, last, cu_seqlens, silu), last


@_conv.register_fake
def _(x, weight, bias, state, cu_seqlens, silu):
    last = x.new_empty(0) if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format), last


@operator("short_conv_triton_", mutates_args=("state",))
@taped
def _conv_in_place(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    last = rows(state)
    y = _launch(x, weight, bias, last, last, cu_seqlens, silu)
    if last is not state:
        state.copy_(last)
    return y


@_conv_in_place.register_fake
def _(x, weight, bias, state, cu_seqlens, silu):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launch(x, weight, bias, state, last, cu_seqlens, silu) -> Tensor:
    """The output; the last inputs go to `last`, which may be the state itself."""
    B, T, D = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, W = rows(x), 2 if weight is None else weight.shape[1]
    step = cu_seqlens is None and STEP["rows"] >= T
    table = STEP | ({"rows": 1} if T == 1 else {}) if step else FORWARD
    state = None if state is None else rows(state)
    before = [None, 0, 0] if state is None else [state, state.stride(0), state.stride(1)]
    after = [None, 0, 0] if state is None else [last, last.stride(0), last.stride(1)]
    if y.numel():
        shape, n_blocks = _tile(table, D)
        _forward[(B * cdiv(T, table["rows"]) * n_blocks,)](
            *_rows_of(x), *_taps(weight), bias, *before, *(after if step else [None, 0, 0]), y,
            row_spans(T, cu_seqlens), T, D=D, W=W, SILU=silu, ALIGN=_alignment(x), ROWS=table["rows"], **shape,
        )  # fmt: skip
    if state is not None and state.numel() and not (step and y.numel()):
        shape, n_blocks = _tile(STEP, D)
        _last[(n_blocks, state.shape[0])](*_rows_of(x), *before, *after, cu_seqlens, T, D=D, W=W, **shape)
    return y


@operator("short_conv_triton_backward")
@taped
def _conv_backward(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, D = x.shape
    dx, dweight, dbias, dstate = _like(x, weight, bias, state)
    x, dy, W = rows(x), rows(dy), 2 if weight is None else weight.shape[1]
    before = [None, 0, 0] if state is None else [rows(state), *rows(state).stride()[:2]]
    dlast = None if state is None else dlast.contiguous()
    given = [*_rows_of(x), *_rows_of(dy), *_taps(weight), bias, *before, dlast]
    shape, n_blocks = _tile(BACKWARD, D)
    share = cdiv(B * T * n_blocks, BACKWARD["programs"])
    stretch = max(BACKWARD["stretch"], cdiv(share, BACKWARD["rows"]) * BACKWARD["rows"])
    places = B * cdiv(T, stretch)
    partial = None if weight is None else torch.empty(places, W + 1, D, dtype=torch.float32, device=x.device)
    if x.numel():
        _backward[(places * n_blocks,)](
            *given, dx, partial, row_spans(T, cu_seqlens), T, stretch,
            D=D, W=W, SILU=silu, ALIGN=min(_alignment(x), _alignment(dy)), ROWS=BACKWARD["rows"], **shape,
        )  # fmt: skip
    if state is not None and state.numel():
        shape, n_blocks = _tile(STEP, D)
        _state_backward[(n_blocks, state.shape[0])](*given, dstate, cu_seqlens, T, D=D, W=W, SILU=silu, **shape)
    if partial is not None:
        total = partial.sum(0)
        dweight.copy_(total[:W].t())
        if bias is not None:
            dbias.copy_(total[W])
    return dx, dweight, dbias, dstate


@_conv_backward.register_fake
def _(dy, dlast, x, weight, bias, state, cu_seqlens, silu):
    return _like(x, weight, bias, state)


def _like(x, *others):
    """Room for the gradient of each; nothing where there is none."""
    made = [x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in others]
    return torch.empty_like(x, memory_format=torch.contiguous_format), *made


def _save(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy, dlast):
    found = _conv_backward(dy, dlast, *ctx.saved_tensors, ctx.silu)
    given = ctx.saved_tensors[:4]
    return *(None if t is None else g for t, g in zip(given, found, strict=True)), None, None


_conv.register_autograd(_gradients, setup_context=_save)
_conv_backward.once_differentiable("short_conv")


def _rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """A [B, T, D] tensor with the strides that matter."""
    return x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1)


def _taps(weight: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if weight is None else (weight, *weight.stride())


def _alignment(x: Tensor) -> int:
    """What every row's offset is a multiple of, so that it loads 16 bytes at a time whatever the length is."""
    return 16 if all(s % 16 == 0 for s in x.stride()[:2]) else 1


def _tile(table: dict[str, int], D: int) -> tuple[dict[str, int], int]:
    """The kernel's options for D channels, and how many blocks those are."""
    block = min(table["block"], power_of_2(D))
    warps = max(1, block // (32 * table["channels"]))
    return {"BLOCK": block, "num_warps": warps}, cdiv(D, block)
