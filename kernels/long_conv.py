"""Causal convolution with filters as long as the sequence, over a buffer of every input so far."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.cache import write_slots
from subquad.kernels.packing import Padded, advance
from subquad.kernels.state import Append, Count, accumulator_dtype
from subquad.kernels.wrapping import full_precision, sequence_op

FEW = 4  # so many tokens read the buffer directly: a transform of the whole of it costs more


class LongConvCache(NamedTuple):
    """Every input so far, in slots 0..count-1 of max_len."""

    x: Append  # [N, S, D]
    count: Count  # [N]


@sequence_op
def long_conv(
    x: Float[Tensor, "B T D"],
    filter: Float[Tensor, "D L"],
    *,
    state: LongConvCache | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T D"], LongConvCache | None]:
    """y_t = sum_s filter[:, s] * x_{t-s}, s from 0 to min(t, L - 1), for each of the D channels.

    state: the inputs so far, of each sequence any number. Returns (y in x's dtype, the new state or None).
    A transform mixes a sequence's tokens before it separates them: later tokens change earlier outputs by rounding.

    Cost: O(T D log T); with a state of S slots O(S D log S) a call, and decoding O(S D) a token: an exact convolution
    reads every input again. S D values of state.
    """
    form = pick("long_conv", _FORMS, x)
    rows = Padded(x.shape[1], cu_seqlens)
    new, time = rows.split(x), rows.length
    dtype = accumulator_dtype(x.dtype)
    count = new.new_zeros(new.shape[0], dtype=torch.int64) if state is None else state.count
    with full_precision(x):
        buffer = new
        if state is not None:
            lengths = time if cu_seqlens is None else cu_seqlens.diff()
            used = _used(state, lengths)
            written = _write(state, new, rows.filled)
            # Slots past the last token may hold those of a sequence that was rewound.
            held = torch.arange(used, device=x.device) < (count + lengths)[:, None]
            buffer = torch.where(held[..., None], written[:, :used], 0)
        y = rows.join(form(buffer.to(dtype), filter.to(dtype), count, time)).to(x.dtype)
    return y, None if state is None else LongConvCache(written, advance(count, x.shape[1], cu_seqlens))


def _used(state: LongConvCache, lengths: Tensor | int) -> int:
    """How many slots to read: those in use where reading counts costs nothing, on the CPU, elsewhere all."""
    slots = state.x.shape[1]
    if state.x.device.type != "cpu" or torch.compiler.is_compiling():
        return slots
    used = int((state.count + lengths).max())
    if used > slots:
        raise UserError(f"the cache has {slots} slots; {used} tokens do not fit (raise max_len)")
    return used


def _write(state: LongConvCache, new: Tensor, filled: Tensor | None) -> Tensor:
    at = state.count[:, None] + torch.arange(new.shape[1], device=new.device)
    sequence = torch.arange(at.shape[0], device=at.device)[:, None].expand_as(at).flatten()
    keep = None if filled is None else filled.flatten()
    written = write_slots(state.x[:, :, None], new.flatten(0, 1)[:, None], sequence, at.flatten(), keep)
    return written[:, :, 0] if torch.is_grad_enabled() else state.x


# Both forms: buffer [N, S, D], zero past each sequence's end -> outputs at positions count .. count + time - 1,
# [N, time, D]; rows that pad a shorter sequence may give anything.


def _naive(buffer, filter, count, time):
    slots, length = buffer.shape[1], filter.shape[1]
    falling = filter.flip(1).T
    outs = []
    for x, start in zip(buffer, count.tolist(), strict=True):
        for t in range(start, start + time):
            end = min(t + 1, slots)
            taps = min(end, length)
            outs.append((falling[length - taps :] * x[end - taps : end]).sum(0))
    return torch.stack(outs).unflatten(0, (-1, time))


def _torch(buffer, filter, count, time):
    slots = buffer.shape[1]
    at = (count[:, None] + torch.arange(time, device=buffer.device)).clamp(max=slots - 1)
    if time <= FEW:
        return torch.stack([_output(buffer, filter, t) for t in at.unbind(1)], 1)
    taps = filter[:, :slots]
    size = _transform_length(slots + taps.shape[1] - 1)
    spectrum = torch.fft.rfft(buffer.mT.contiguous(), n=size) * torch.fft.rfft(taps, n=size)
    y = torch.fft.irfft(spectrum, n=size)[..., :slots].mT
    return y if time == slots else y.take_along_dim(at[..., None], 1)


def _output(buffer: Tensor, filter: Tensor, t: Tensor) -> Tensor:
    """The outputs at positions t [N], [N, D]."""
    lag = t[:, None] - torch.arange(buffer.shape[1], device=t.device)
    inside = (lag >= 0) & (lag < filter.shape[1])
    taps = F.embedding(lag.clamp(0, filter.shape[1] - 1), filter.T)
    return torch.where(inside[..., None], taps * buffer, 0).sum(1)


def _transform_length(n: int) -> int:
    """The least 2^i or 3 2^i that is at least n: transforms of such lengths are fast."""
    power = 1 << max(n - 1, 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 else power


_FORMS = register("long_conv", naive=_naive, torch=_torch)
