"""Hyena: gates and long convolutions in turn, their filters given by a small network of the position."""

from math import log, pi
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.long_conv import LongConvCache, long_conv
from subquad.kernels.packing import mask_padding
from subquad.kernels.short_conv import short_conv
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.kernels.wrapping import full_precision
from subquad.layers.base import (
    Card,
    Facts,
    Layer,
    WideLinear,
    call_in_dtype,
    check_length,
    conv_weight,
    is_plain,
    placement,
)


class HyenaState(NamedTuple):
    conv: Recurrent  # [N, W-1, (order + 1) D]
    filters: tuple[Any, ...]  # what each long filter carries


class ImplicitFilter(nn.Module):
    """n filters as a function of the position: a sine network of Fourier features, times a decaying window.

    h_t = W(sin(w L(sin(w L(sin(w L e_t)))))) exp(-rate t / max_len), e_t = (t / max_len, cos and sin of frequencies
    below n_features / 2 cycles over max_len); the filters' rates span `fast` to `slow`: the share of max_len after
    which a window has fallen to 1/100.
    """

    facts = Facts(no_decay=("sine", "rate"), float32=("layers", "out", "sine", "rate"), keeps_init=("layers", "out"))

    def __init__(self, n: int, max_len: int, n_features: int, width: int, depth: int, sine: float):
        super().__init__()
        if n_features < 3 or n_features % 2 == 0:
            raise UserError(f"Hyena: n_features is odd and at least 3 (t, cosines, sines); got {n_features}")
        self.max_len, self.n_features = max_len, n_features
        self.layers = nn.ModuleList(WideLinear(n_features if i == 0 else width, width) for i in range(depth))
        self.out = WideLinear(width, n, bias=False)
        self.sine = nn.Parameter(torch.full((width,), sine))
        fast, slow = -log(0.01) / 0.3, -log(0.01) / 1.5
        self.rate = nn.Parameter(torch.linspace(fast, slow, n))

        self.known: tuple[list[Any], Tensor] | None = None  # all taps, and the tensors they came from

    def forward(self, length: int) -> Float[Tensor, "n L"]:
        """The first `length` taps, at least float32 whatever the weights: bf16 tells 256 positions apart."""
        parts = [*self.layers, self.out]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not all(map(is_plain, parts)):
            return self.taps(length)
        # Decoding asks for the same taps at every token.
        tensors = list(self.parameters())
        if self.known is None or not _unchanged(self.known[0], tensors):
            self.known = _snapshot(tensors), self.taps(self.max_len)
        return self.known[1][:, :length]

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed again."""
        return self.__dict__ | {"known": None}

    def taps(self, length: int) -> Float[Tensor, "n L"]:
        dtype = accumulator_dtype(self.rate.dtype)
        t = torch.arange(length, dtype=dtype, device=self.rate.device)[:, None] / self.max_len
        n_bands = self.n_features // 2
        angle = 2 * pi * t * torch.linspace(1e-4, max(n_bands - 1, 1), n_bands, dtype=dtype, device=t.device)
        with full_precision(t):
            h = torch.cat([t, angle.cos(), -angle.sin()], 1)
            for layer in self.layers:
                h = torch.sin(self.sine.to(dtype) * call_in_dtype(layer, h))
            return (call_in_dtype(self.out, h) * (-t * self.rate.to(dtype).abs()).exp()).T


def _snapshot(tensors: list[Tensor]) -> list[Any]:
    """What tells later whether the tensors changed: copies on the CPU; elsewhere, where comparing would wait for the
    device, the tensors themselves with their versions, which a write through `.data` escapes."""
    return [t.detach().clone() if t.is_cpu else (t, t.data_ptr(), _version(t)) for t in tensors]


def _unchanged(before: list[Any], tensors: list[Tensor]) -> bool:
    def same(old: Any, new: Tensor) -> bool:
        if isinstance(old, Tensor):
            return new.is_cpu and old.dtype == new.dtype and torch.equal(old, new)
        return old[0] is new and old[1:] == (new.data_ptr(), _version(new)) and old[2] is not None

    return len(before) == len(tensors) and all(map(same, before, tensors))


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version  # inference tensors count no changes


class HyenaOperator(Layer):
    """x^1, .., x^order, v = conv(in_proj(x));  v = h^n * (x^n . v) for n < order;  y = out_proj(x^order . v).

    A layer built on it gives `long_filters`, one for each n < order, and `convolve(v, filter, state, cu_seqlens)`; a
    weight for the input at the same token, `skip`, is added here.
    """

    facts = Facts(no_decay=("conv_weight", "skip"), residual=("out_proj",))

    def __init__(self, d_model: int, order: int, d_conv: int):
        super().__init__()
        if order < 2:
            raise UserError(f"{type(self).__name__}: order is at least 2, a long filter between two gates; not {order}")
        self.order = order
        self.in_proj = nn.Linear(d_model, (order + 1) * d_model)
        self.conv_weight, self.conv_bias = conv_weight((order + 1) * d_model, d_conv, True)
        self.skip = nn.Parameter(torch.randn(order - 1, d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=True)

    def long_filters(self, time: int, state: HyenaState | None) -> list[Any]:
        raise NotImplementedError

    def convolve(self, v: Tensor, filter: Any, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def forward(
        self, x: Float[Tensor, "B T D"], state: HyenaState | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], HyenaState | None]:
        filters = self.long_filters(x.shape[1], state)
        p, conv = short_conv(
            self.in_proj(x),
            self.conv_weight,
            self.conv_bias,
            state=None if state is None else state.conv,
            cu_seqlens=cu_seqlens,
        )
        *gates, v = p.chunk(self.order + 1, -1)
        carried = []
        for n, filter in enumerate(filters):
            v = gates[n] * v
            o, after = self.convolve(v, filter, None if state is None else state.filters[n], cu_seqlens)
            v = o + self.skip[n].to(v.dtype) * v
            carried.append(after)
        y = mask_padding(self.out_proj(gates[-1] * v), cu_seqlens)
        return y, None if state is None else HyenaState(conv, tuple(carried))

    def empty_conv(self, batch_size: int, dtype: torch.dtype | None) -> Tensor:
        (dtype, device), (width, taps) = placement(self, dtype), self.conv_weight.shape
        return torch.zeros(batch_size, taps - 1, width, dtype=dtype, device=device)


class Hyena(HyenaOperator):
    """Hyena (Poli et al. 2023, arXiv:2302.10866).

    x^1, .., x^order, v = conv(in_proj(x));  v = h^n * (x^n . v) for n < order;  y = out_proj(x^order . v),
    * a causal convolution over all tokens, h^n_t = network(t) exp(-rate t) plus a weight at t = 0. As in the authors'
    code the short convolution serves as the first filter, so order 2 has one long filter.

    Cost: train O(T D log T). Decoding is exact and O(T D) a token for each long filter, over a buffer that grows with
    the sequence; `distill_filter` fits a layer that decodes in O(1). State (order - 1) S D values for S = max_len
    slots, (order + 1) D (W - 1) for the short convolution.

    Arguments
        order: gates; one less long filter a channel. max_len: tokens the filters are defined for; longer sequences are
        an error. d_conv: W, width of the short convolution. n_features: odd, features of the position. filter_width,
        filter_depth: of the network. sine: initial frequency of its sines.
    """

    card = Card("Poli et al. 2023, arXiv:2302.10866", "long_conv", "O(T D log T)", "O(S D)", "(order - 1) S D")
    causality = "regrouped"
    constant_state = False

    def __init__(
        self,
        d_model: int,
        *,
        order: int = 2,
        max_len: int = 2048,
        d_conv: int = 3,
        n_features: int = 33,
        filter_width: int = 64,
        filter_depth: int = 3,
        sine: float = 10.0,
    ):
        super().__init__(d_model, order, d_conv)
        self.max_len: int = max_len
        self.filter = ImplicitFilter((order - 1) * d_model, max_len, n_features, filter_width, filter_depth, sine)

    def long_filters(self, time: int, state: HyenaState | None) -> list[Tensor]:
        length = min(time, self.max_len)
        if state is not None:
            cache = state.filters[0]
            length = cache.x.shape[1]
            if cache.x.device.type == "cpu" and not torch.compiler.is_compiling():  # where reading counts costs nothing
                length = min(length, max(cache.count.tolist(), default=0) + time)
        return list(self.filter(max(length, 1)).chunk(self.order - 1))

    def convolve(
        self, v: Tensor, filter: Tensor, state: LongConvCache | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LongConvCache | None]:
        check_length(self, v.shape[1], None if state is None else state.count, cu_seqlens)
        return long_conv(v, filter, state=state, cu_seqlens=cu_seqlens)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> HyenaState:
        """An empty buffer with max_len slots for each long filter."""
        check_length(self, max_len)
        conv = self.empty_conv(batch_size, dtype)
        shape = (batch_size, max_len, self.skip.shape[1])
        return HyenaState(
            conv,
            tuple(
                LongConvCache(conv.new_zeros(shape), conv.new_zeros(batch_size, dtype=torch.int64))
                for _ in range(self.order - 1)
            ),
        )
