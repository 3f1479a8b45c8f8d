"""Gated DeltaProduct: several steps of the delta rule a token."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.delta_rule import delta_rule
from subquad.layers.base import Card
from subquad.layers.delta import DeltaLayer, DeltaState


class GatedDeltaProduct(DeltaLayer):
    """Gated DeltaProduct (Siems et al. 2025, arXiv:2502.10297).

    q; k_1 .. k_R, v_1 .. v_R = silu(conv(qkv_proj(x)));  q, k of unit length, q / sqrt(K);  beta = 2 sigmoid(b_proj(x))
    S_t = exp(g_t) S_{t-1}, then R times S_t <- (I - beta_r k_r k_r^T) S_t + beta_r k_r v_r^T;  o_t = S_t^T q_t
    y_t = o_proj(norm(o_t) * silu(z_proj(x_t)));  g = -exp(A_log) softplus(a_proj(x) + dt_bias)

    A product of R reflections and erasures reaches any rotation of rank R in one token, where one writes a single key.

    Cost: train O(T R H K V), decode O(R H K V) a token, state H K V + (W - 1) H (K + R (K + V)) values.

    Arguments
        n_heads: H; head_dim: K, by default 64 or what of it divides d_model. expand_v: V / K.
        n_factors: R, steps a token.
        decay: False leaves g out (DeltaProduct).
        d_conv: W, width of the convolution. conv_bias: on it.
        negative_eigenvalues: beta in (0, 2) as above, which reflections need; False keeps it in (0, 1).
        A_range, dt_min, dt_max: ranges of the initial decay rates and step sizes.
    """

    card = Card(
        "Siems et al. 2025, arXiv:2502.10297",
        "delta_rule",
        "O(T R H K V)",
        "O(R H K V)",
        "H K V + (W - 1) H (K + R (K + V))",
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        n_factors: int = 2,
        decay: bool = True,
        d_conv: int = 4,
        conv_bias: bool = False,
        negative_eigenvalues: bool = True,
        A_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        norm_eps: float = 1e-6,
    ):
        super().__init__(
            d_model,
            n_heads=n_heads,
            head_dim=head_dim,
            n_factors=n_factors,
            expand_v=expand_v,
            d_conv=d_conv,
            conv_bias=conv_bias,
            negative_eigenvalues=negative_eigenvalues,
            norm_eps=norm_eps,
        )
        self.z_proj = nn.Linear(d_model, self.n_heads * self.V, bias=False)
        self.a_proj = nn.Linear(d_model, self.n_heads, bias=False) if decay else None
        if decay:
            self.add_decay(self.n_heads, A_range, dt_min, dt_max)

    def forward(
        self, x: Float[Tensor, "B T D"], state: DeltaState | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], DeltaState | None]:
        conv, S = state if state is not None else (None, None)
        q, k, v, conv = self.qkv(x, conv, cu_seqlens)
        g = None if self.a_proj is None else self.log_decay(self.a_proj(x))
        o, S = delta_rule(*self.unit(q, k), v, self.beta(x), g, state=S, cu_seqlens=cu_seqlens)
        y = self.output(o, self.z_proj(x), cu_seqlens)
        return y, None if state is None else DeltaState(conv, S)
