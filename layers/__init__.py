"""The zoo: token mixers and feed-forward layers, each with one signature and one op.

    y, state = layer(x, state=None, cu_seqlens=None)
"""

from subquad.layers.base import Card, Layer
from subquad.layers.linear_attention import LinearAttention
from subquad.layers.mlp import MLP, SwiGLU

__all__ = ["MLP", "Card", "Layer", "LinearAttention", "SwiGLU"]


def available() -> dict[str, type[Layer]]:
    """Every layer by name."""
    return {
        name: value
        for name in __all__
        if isinstance(value := globals()[name], type) and issubclass(value, Layer) and value is not Layer
    }
