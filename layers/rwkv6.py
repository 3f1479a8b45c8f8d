"""RWKV-6, Finch: the mix with the token before and the decay depend on the data."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from subquad.kernels.short_conv import shift
from subquad.kernels.state import accumulator_dtype
from subquad.layers.base import Card, Facts
from subquad.layers.rwkv_parts import LowRank, MatrixWKV, TokenShift, initial_decay


class DataDependentShift(TokenShift):
    """x_t + (x_{t-1} - x_t) (mu_s + tanh(x_mix A_s) B_s) for each stream s, where x_mix is the mix by a mu of its own.

    `mu` [1 + S, D] holds that one first. rank: R of A_s [D, R] (zero at first) and B_s [R, D].
    """

    facts = Facts(keeps_init=("down",))

    def __init__(
        self,
        d_model: int,
        powers: Sequence[float],
        rank: int,
        *,
        lifts: Sequence[float],
        layer_idx: int = 0,
        n_layers: int = 1,
    ):
        super().__init__(d_model, (1.0, *powers), lifts=(0.0, *lifts), layer_idx=layer_idx, n_layers=n_layers)
        self.down = nn.Linear(d_model, len(powers) * rank, bias=False)
        nn.init.zeros_(self.down.weight)
        self.up = nn.Parameter(torch.empty(len(powers), rank, d_model).uniform_(-0.01, 0.01))

    def forward(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        before, state = shift(x, state=state, cu_seqlens=cu_seqlens)
        change = before - x
        mu_mix, *mu = self.mu.to(x.dtype)
        inner = self.down(x + change * mu_mix).tanh().chunk(len(mu), -1)
        return [x + change * (m + h @ B) for m, h, B in zip(mu, inner, self.up, strict=True)], state


class RWKV6(MatrixWKV):
    """Finch's time mixing (Peng et al. 2024, arXiv:2404.05892).

    x_s = x_t + (x_{t-1} - x_t) (mu_s + tanh(x_mix A_s) B_s) for s = r, k, v, z, w;  r, k, v, z = their projections
    g_t = -exp(w + tanh(x_w A) B)
    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t,  S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
    y_t = o_proj(group_norm(o_t) * silu(z_t))

    Cost: train O(T D K), decode O(D K) a token, state D K + D; K = head_dim.

    Arguments
        head_dim: K, width of a head, 64 where it divides d_model. mix_rank, decay_rank: ranks of the data-dependent
        parts. layer_idx, n_layers: set the initial values of mu, w and u, as in the paper's code. norm_eps: of the
        group norm (64e-5: 1e-5 on o / 8 in that code).
    """

    card = Card("Peng et al. 2024, arXiv:2404.05892", "linear_attention", "O(T D K)", "O(D K)", "D K + D")

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int | None = None,
        mix_rank: int = 32,
        decay_rank: int = 64,
        layer_idx: int = 0,
        n_layers: int = 1,
        norm_eps: float = 64e-5,
    ):
        super().__init__(d_model, head_dim, layer_idx, n_layers, norm_eps)
        self.token_shift = DataDependentShift(
            d_model,
            (0.5, 1.0, 1.0, 0.5, 1.0),
            mix_rank,
            lifts=(0.0, 0.0, 0.3, 0.0, 0.0),
            layer_idx=layer_idx,
            n_layers=n_layers,
        )
        w = initial_decay(d_model, layer_idx, n_layers)
        self.w = LowRank(d_model, decay_rank, d_model, activation="tanh", bias=w)

    def log_decay(self, *streams: Tensor) -> Tensor:
        w = self.w(*streams)
        return -w.to(accumulator_dtype(w.dtype)).exp().unflatten(-1, (self.n_heads, -1))
