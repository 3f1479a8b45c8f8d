"""The zoo: token mixers and feed-forward layers, each with one signature and one op.

y, state = layer(x, state=None, cu_seqlens=None)
"""

from subquad.layers.attention import Attention
from subquad.layers.base import Card, Layer
from subquad.layers.gated_deltanet import GatedDeltaNet
from subquad.layers.linear_attention import LinearAttention
from subquad.layers.mamba import Mamba
from subquad.layers.mamba2 import Mamba2
from subquad.layers.mlp import MLP, SwiGLU
from subquad.layers.moe import MoE

__all__ = [
    "MLP",
    "Attention",
    "Card",
    "GatedDeltaNet",
    "Layer",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "MoE",
    "SwiGLU",
]


def available() -> dict[str, type[Layer]]:
    """Every layer by name."""
    return {
        name: value
        for name in __all__
        if isinstance(value := globals()[name], type) and issubclass(value, Layer) and value is not Layer
    }
