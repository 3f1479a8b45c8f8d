"""Several mixers side by side on one input."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.packing import mask_padding
from subquad.layers.base import Card, Layer, available_if
from subquad.layers.build import build_layer
from subquad.layers.norms import RMSNorm


class ParallelState(NamedTuple):
    mixers: tuple[Any, ...]


class Parallel(Layer):
    """Mixers on one input, their outputs normed and averaged (Hymba: Dong et al. 2024, arXiv:2411.13676).

    y_t = 1/M sum_m norm_m(mixer_m(x)_t), each norm with its own weights; without norms the plain sum (Falcon-H1).

    Cost and state: the sums of the mixers'.

    Arguments
        mixers: names of layers, or mappings {name: ..., **arguments}; by default windowed attention and Mamba-2.
        norm: RMSNorm on each output and the mean; False for the plain sum.
    """

    card = Card("Dong et al. 2024, arXiv:2411.13676", "its mixers'", "sum", "sum", "sum")
    min_width = 2

    def __init__(
        self,
        d_model: int,
        *,
        mixers: Sequence[str | dict[str, Any]] = ({"name": "Attention", "window": 256}, "Mamba2"),
        norm: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
        n_layers: int = 1,
    ):
        super().__init__()
        if not mixers:
            raise UserError("Parallel: mixers is empty; give at least one layer")
        built = [
            build_layer(f"mixers[{i}]", spec, d_model=d_model, layer_idx=layer_idx, n_layers=n_layers)
            for i, spec in enumerate(mixers)
        ]
        self.mixers = nn.ModuleList(built)
        self.norms = nn.ModuleList([RMSNorm(d_model, eps=norm_eps) for _ in built]) if norm else None
        self.takes_shared = ["shared" in inspect.signature(m.forward).parameters for m in built]
        # What holds for the whole follows from the parts.
        self.constant_state = all(getattr(m, "constant_state", True) for m in built)
        self.discrete = any(getattr(m, "discrete", False) for m in built)
        self.causal = all(getattr(m, "causal", True) for m in built)
        exact = all(getattr(m, "causality", "exact") == "exact" for m in built)
        self.causality = "exact" if exact else "regrouped"

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: ParallelState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
        shared: dict[str, Any] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ParallelState | None]:
        outs, states = [], []
        for i, mixer in enumerate(self.mixers):
            extra = {"shared": shared} if self.takes_shared[i] else {}
            before = None if state is None else state.mixers[i]
            o, after = mixer(x, state=before, cu_seqlens=cu_seqlens, **extra)
            outs.append(o if self.norms is None else self.norms[i](o))
            states.append(after)
        y = torch.stack(outs).sum(0) if self.norms is None else torch.stack(outs).mean(0)
        return mask_padding(y, cu_seqlens), None if state is None else ParallelState(tuple(states))

    @available_if(lambda self: all(hasattr(m, "init_state") for m in self.mixers), "one of its mixers cannot decode")
    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> ParallelState:
        """The states of all mixers."""
        return ParallelState(tuple(m.init_state(batch_size, max_len, dtype) for m in self.mixers))
