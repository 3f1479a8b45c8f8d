"""subquad: efficient sequence-model architectures with one contract, one model and one inference loop.

The names most people need are here; each loads on first use, so that `import subquad` costs nothing:

    model = subquad.load("runs/demo/model")          # a saved LM and its tokenizer
    text = subquad.generate(model, "def main(")      # one loop for every architecture
    from subquad.layers import Mamba2                # any layer, in any torch model
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LM", "UserError", "__version__", "generate", "load", "pack", "unpack"]

if TYPE_CHECKING:
    from subquad.errors import UserError
    from subquad.infer.generate import generate
    from subquad.kernels.packing import pack, unpack
    from subquad.models.checkpoint import load
    from subquad.models.lm import LM

_HOMES = {
    "LM": "subquad.models.lm",
    "UserError": "subquad.errors",
    "generate": "subquad.infer.generate",
    "load": "subquad.models.checkpoint",
    "pack": "subquad.kernels.packing",
    "unpack": "subquad.kernels.packing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'subquad' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
