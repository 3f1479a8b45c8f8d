"""DeltaNet: linear attention that overwrites what a key held before."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.delta_rule import delta_rule
from subquad.kernels.state import accumulator_dtype
from subquad.layers.base import Card
from subquad.layers.delta import DeltaLayer, DeltaState
from subquad.layers.feature_maps import positive_elu


class DeltaNet(DeltaLayer):
    """DeltaNet (Schlag et al. 2021, arXiv:2102.11174; in chunks Yang et al. 2024, arXiv:2406.06484).

    q, k, v = conv(qkv_proj(x));  q, k = phi(q), phi(k) of unit length, q / sqrt(K);  v = silu(v);
    beta = sigmoid(b_proj(x))
    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t,  y_t = o_proj(norm(o_t))

    Cost: train O(T H K V), decode O(H K V) a token, state H K V + (W - 1) H (2 K + V) values.

    Arguments
        n_heads: H; head_dim: K, by default 64 or what of it divides d_model. expand_v: V / K.
        feature_map: phi, "silu", "elu" (1 + elu, as in 2021), "relu" or "identity".
        qk_norm: "l2", or "sum" (features that sum to one, q not scaled further; only with a positive map, "elu").
        output_gate: multiply norm(o_t) with silu(z_proj(x_t)).
        d_conv: W, width of the convolution. conv_bias: on it.
        negative_eigenvalues: beta in (0, 2), so that the state can also flip sign (Grazzi et al. 2024,
        arXiv:2411.12537).
    """

    card = Card(
        "Yang et al. 2024, arXiv:2406.06484", "delta_rule", "O(T H K V)", "O(H K V)", "H K V + (W - 1) H (2 K + V)"
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        feature_map: Literal["silu", "elu", "relu", "identity"] = "silu",
        qk_norm: Literal["l2", "sum"] = "l2",
        output_gate: bool = False,
        d_conv: int = 4,
        conv_bias: bool = False,
        negative_eigenvalues: bool = False,
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
        self.phi = {"silu": None, "elu": positive_elu, "relu": F.relu, "identity": nn.Identity()}[feature_map]
        if qk_norm == "sum" and feature_map != "elu":
            raise UserError(f"DeltaNet: qk_norm 'sum' needs positive features, feature_map 'elu', not {feature_map!r}")
        self.sums = qk_norm == "sum"
        self.z_proj = nn.Linear(d_model, self.n_heads * self.V, bias=False) if output_gate else None

    def forward(
        self, x: Float[Tensor, "B T D"], state: DeltaState | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], DeltaState | None]:
        conv, S = state if state is not None else (None, None)
        q, k, v, conv = self.qkv(x, conv, cu_seqlens, activation="silu" if self.phi is None else None)
        if self.phi is not None:
            q, k, v = *(self.phi(t.to(accumulator_dtype(t.dtype))) for t in (q, k)), F.silu(v)
        q, k = (t / t.sum(-1, keepdim=True) for t in (q, k)) if self.sums else self.unit(q, k)
        o, S = delta_rule(q, k, v, self.beta(x), state=S, cu_seqlens=cu_seqlens)
        y = self.output(o, None if self.z_proj is None else self.z_proj(x), cu_seqlens)
        return y, None if state is None else DeltaState(conv, S)
