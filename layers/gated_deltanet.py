"""Gated DeltaNet: the delta rule with a scalar decay a head."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.delta_rule import delta_rule
from subquad.layers.base import Card
from subquad.layers.delta import DeltaLayer, DeltaState


class GatedDeltaNet(DeltaLayer):
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464).

    q, k, v = silu(conv(qkv_proj(x)));  q, k of unit length, q / sqrt(K);  beta = sigmoid(b_proj(x))
    g = -exp(A_log) softplus(a_proj(x) + dt_bias)
    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t
    y_t = o_proj(norm(o_t) * silu(z_proj(x_t)))

    Cost: train O(T H K V), decode O(H K V) a token, state H K V + (W - 1) (2 G K + H V) values.

    Arguments
        n_heads: H heads of v and of the state; head_dim: K, by default 64 or what of it divides d_model.
        n_key_heads: G heads of q and k, dividing H; by default H. expand_v: V / K.
        d_conv: W, width of the convolution. conv_bias: on it.
        negative_eigenvalues: beta in (0, 2), so that the state can also flip sign (Grazzi et al. 2024,
        arXiv:2411.12537). A_range, dt_min, dt_max: ranges of the initial decay rates and step sizes.
    """

    card = Card(
        "Yang et al. 2024, arXiv:2412.06464", "delta_rule", "O(T H K V)", "O(H K V)", "H K V + (W - 1) (2 G K + H V)"
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        n_key_heads: int | None = None,
        expand_v: float = 1.0,
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
            n_key_heads=n_key_heads,
            expand_v=expand_v,
            d_conv=d_conv,
            conv_bias=conv_bias,
            negative_eigenvalues=negative_eigenvalues,
            norm_eps=norm_eps,
        )
        self.a_proj = nn.Linear(d_model, self.n_heads, bias=False)
        self.z_proj = nn.Linear(d_model, self.n_heads * self.V, bias=False)
        self.add_decay(self.n_heads, A_range, dt_min, dt_max)

    def forward(
        self, x: Float[Tensor, "B T D"], state: DeltaState | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], DeltaState | None]:
        conv, S = state if state is not None else (None, None)
        q, k, v, conv = self.qkv(x, conv, cu_seqlens)
        g = self.log_decay(self.a_proj(x))
        o, S = delta_rule(*self.unit(q, k), v, self.beta(x), g, state=S, cu_seqlens=cu_seqlens)
        y = self.output(o, self.z_proj(x), cu_seqlens)
        return y, None if state is None else DeltaState(conv, S)
