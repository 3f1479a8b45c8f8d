"""Kimi Delta Attention: the delta rule with a decay for every key channel."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.delta_rule import delta_rule
from subquad.layers.base import Card
from subquad.layers.delta import DeltaLayer, DeltaState


class KimiDeltaAttention(DeltaLayer):
    """Kimi Delta Attention (Kimi Team 2025, arXiv:2510.26692).

    q, k, v = silu(conv(qkv_proj(x)));  q, k of unit length, q / sqrt(K);  beta = sigmoid(b_proj(x))
    g = -exp(A_log) softplus(a_proj(x) + dt_bias) for each of the H K channels, a_proj of low rank
    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t
    y_t = o_proj(norm(o_t) * sigmoid(z_proj(x_t))), z_proj of low rank

    Cost: train O(T H K V), decode O(H K V) a token, state H K V + (W - 1) H (2 K + V) values.

    Arguments
        n_heads: H; head_dim: K, by default 64 or what of it divides d_model. expand_v: V / K.
        rank: of the decay's and the gate's projections; by default K.
        d_conv: W, width of the convolution. conv_bias: on it.
        negative_eigenvalues: beta in (0, 2), so that the state can also flip sign (Grazzi et al. 2024,
        arXiv:2411.12537). A_range, dt_min, dt_max: ranges of the initial decay rates and step sizes.
    """

    card = Card(
        "Kimi Team 2025, arXiv:2510.26692", "delta_rule", "O(T H K V)", "O(H K V)", "H K V + (W - 1) H (2 K + V)"
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        rank: int | None = None,
        d_conv: int = 4,
        conv_bias: bool = False,
        negative_eigenvalues: bool = False,
        A_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        norm_eps: float = 1e-6,
    ):
        super().__init__(
            d_model,
            n_heads=n_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            d_conv=d_conv,
            conv_bias=conv_bias,
            negative_eigenvalues=negative_eigenvalues,
            norm_eps=norm_eps,
        )
        rank, inner = rank or self.K, self.n_heads * self.K
        self.a_proj = nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, inner, bias=False))
        self.z_proj = nn.Sequential(
            nn.Linear(d_model, rank, bias=False), nn.Linear(rank, self.n_heads * self.V, bias=False)
        )
        self.add_decay(inner, A_range, dt_min, dt_max)

    def forward(
        self, x: Float[Tensor, "B T D"], state: DeltaState | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], DeltaState | None]:
        conv, S = state if state is not None else (None, None)
        q, k, v, conv = self.qkv(x, conv, cu_seqlens)
        g = self.log_decay(self.a_proj(x).unflatten(-1, (self.n_heads, self.K)))
        o, S = delta_rule(*self.unit(q, k), v, self.beta(x), g, state=S, cu_seqlens=cu_seqlens)
        y = self.output(o, self.z_proj(x), cu_seqlens, activation="sigmoid")
        return y, None if state is None else DeltaState(conv, S)
