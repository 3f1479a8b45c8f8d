"""Nystromformer: bidirectional attention through landmarks."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.nystrom_attention import nystrom_attention
from subquad.layers.base import Card, Facts
from subquad.layers.softmax_heads import SoftmaxLayer


class NystromAttention(SoftmaxLayer):
    """Nystrom attention (Xiong et al. 2021, arXiv:2102.03902). It reads the whole sequence: an encoder's layer, which
    has no state and cannot decode.

    y = o_proj(softmax(q k~^T) pinv(softmax(q~ k~^T)) softmax(q~ k^T) v + conv * v), where the landmarks q~, k~ are
    means over n_landmarks segments of the sequence; of n_landmarks tokens or fewer it is exact softmax attention.

    Cost: train O(T m D + m^3 H) for m landmarks.

    Arguments
        n_heads: H; by default heads of width 64. n_landmarks: m. n_iterations: of the pseudo-inverse.
        d_conv: odd width of the filter on the values, one a head; None for none.
        rope_theta: base of the rotary embedding, None for none (the paper adds positions to the embedding).
        bias: on q, k, v.
    """

    card = Card("Xiong et al. 2021, arXiv:2102.03902", "nystrom_attention", "O(T m D)", "-", "-")
    causal = False
    facts = Facts(no_decay=("conv_weight",))

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        n_landmarks: int = 64,
        n_iterations: int = 6,
        d_conv: int | None = 33,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
    ):
        super().__init__()
        self.build_heads(d_model, n_heads=n_heads, rope_theta=rope_theta, bias=bias)
        self.n_landmarks, self.n_iterations = n_landmarks, n_iterations
        if d_conv is not None and d_conv % 2 == 0:
            raise UserError(f"NystromAttention: d_conv is {d_conv}; a filter centred on its token has odd width")
        self.conv_weight = None
        if d_conv is not None:
            bound = d_conv**-0.5
            self.conv_weight = nn.Parameter(torch.empty(self.n_heads, d_conv).uniform_(-bound, bound))

    def forward(
        self, x: Float[Tensor, "B T D"], state: Any = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], None]:
        if state is not None:
            raise UserError("NystromAttention reads the whole sequence at once and cannot go on from a state")
        q, k, v = self.heads(x, None, cu_seqlens)
        o = nystrom_attention(
            q,
            k,
            v,
            n_landmarks=self.n_landmarks,
            n_iterations=self.n_iterations,
            conv=self.conv_weight,
            cu_seqlens=cu_seqlens,
        )
        return self.merge(o, cu_seqlens), None
