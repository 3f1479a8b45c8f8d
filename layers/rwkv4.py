"""RWKV4: an attention-free weighted average with exponential decay, kept finite by a running maximum."""

from math import log
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.packing import mask_padding
from subquad.kernels.running_max import running_max
from subquad.kernels.scan import scan
from subquad.kernels.short_conv import shift
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import Card, Facts, Layer, placement, width_of
from subquad.layers.rwkv_parts import TokenShift, initial_decay

LOWEST = -1e38  # of the running maximum: finite in float32, with every decay added to it


class RWKV4State(NamedTuple):
    shift: Recurrent  # [N, 1, D], the last input
    h: Recurrent  # [N, 2, inner width], numerator and denominator over exp(m)
    m: Recurrent  # [N, inner width], the running maximum


class RWKV4(Layer):
    """Time mixing of RWKV-4 (Peng et al. 2023, arXiv:2305.13048).

    r, k, v = projections of x_t and x_{t-1} mixed feature by feature;  w = -exp(decay)
    num_t = exp(w) num_{t-1} + exp(k_t) v_t,  den_t = exp(w) den_{t-1} + exp(k_t)
    o_t = (num_{t-1} + exp(bonus + k_t) v_t) / (den_{t-1} + exp(bonus + k_t)),  y_t = o_proj(sigmoid(r_t) * o_t)

    num and den are kept over exp(m_t), m_t = max(m_{t-1} + w, k_t).

    Cost: train and decode O(D D') a token, state 3 D' + D values; D' = expand * D.

    Arguments: expand: D' / D. layer_idx, n_layers: the layer's place, given by the model; initial decays and mixing
    weights depend on it as in the published models.
    """

    card = Card("Peng et al. 2023, arXiv:2305.13048", "scan", "O(T D')", "O(D')", "3 D' + D")
    facts = Facts(no_decay=("decay", "bonus"), float32=("decay",), residual=("o_proj",))

    def __init__(self, d_model: int, *, expand: float = 1.0, layer_idx: int = 0, n_layers: int = 1):
        super().__init__()
        inner = width_of(self, "expand", expand, d_model)
        self.d_model, self.inner = d_model, inner
        place = {"layer_idx": layer_idx, "n_layers": n_layers}
        self.token_shift = TokenShift(d_model, [0.5, 1.0, 1.0], lifts=[0.0, 0.0, 0.3], **place)
        self.decay = nn.Parameter(initial_decay(inner, low=-5.0, span=8.0, **place))
        zigzag = 0.5 * ((torch.arange(inner) + 1) % 3 - 1)
        self.bonus = nn.Parameter(log(0.3) + zigzag)
        self.r_proj = nn.Linear(d_model, inner, bias=False)
        self.k_proj = nn.Linear(d_model, inner, bias=False)
        self.v_proj = nn.Linear(d_model, inner, bias=False)
        self.o_proj = nn.Linear(inner, d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "B T D"], state: RWKV4State | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], RWKV4State | None]:
        wide = accumulator_dtype(x.dtype)
        if state is None:
            n_seqs = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            last, h = None, x.new_zeros(n_seqs, 2, self.inner, dtype=wide)
            m = h.new_full((n_seqs, self.inner), LOWEST)
        else:
            last, h, m = state
        (r, k, v), last = self.token_shift(x, last, cu_seqlens)
        k, v = self.k_proj(k).to(wide), self.v_proj(v).to(wide)
        w = -self.decay.to(wide).exp()
        carried = torch.cat([h.flatten(1), m], -1)[:, None]  # a copy: the ops below write into h and m
        maximum, m = running_max(w.expand_as(k), k, state=m, cu_seqlens=cu_seqlens)
        m_before, _ = shift(maximum, state=carried[..., -self.inner :], cu_seqlens=cu_seqlens)
        write = (k - maximum).exp()
        values = torch.stack([write * v, write], 2)
        keep = (m_before + w - maximum).exp()[:, :, None].expand_as(values)
        sums, h = scan(keep, values, state=h, cu_seqlens=cu_seqlens)
        sums, _ = shift(sums.flatten(2), state=carried[..., : -self.inner], cu_seqlens=cu_seqlens)
        num, den = sums.chunk(2, -1)
        now = k + self.bonus.to(wide)
        peak = torch.maximum(m_before, now)
        past, present = (m_before - peak).exp(), (now - peak).exp()
        o = (past * num + present * v) / (past * den + present)
        y = mask_padding(self.o_proj(self.r_proj(r).sigmoid() * o.to(x.dtype)), cu_seqlens)
        return y, None if state is None else RWKV4State(last, h, m)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> RWKV4State:
        """The state before any token; its size does not depend on max_len. The maximum starts very low, not at -inf."""
        dtype, device = placement(self, dtype)
        last = torch.zeros(batch_size, 1, self.d_model, dtype=dtype, device=device)
        h = torch.zeros(batch_size, 2, self.inner, dtype=accumulator_dtype(dtype), device=device)
        return RWKV4State(last, h, h.new_full((batch_size, self.inner), LOWEST))
