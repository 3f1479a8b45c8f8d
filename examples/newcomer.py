"""A mixer of one's own, outside the package: used as `newcomer.LeakyAverage` by whatever runs in this folder.

subquad conformance newcomer.LeakyAverage
subquad train fit --config newcomer.yaml --data.files "*.py" --run_dir runs/newcomer
infer --model runs/newcomer/model --prompt "def " --trust-code
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.packing import mask_padding
from subquad.kernels.scan import scan
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers import Layer


class LeakyAverageState(NamedTuple):
    h: Recurrent  # [N, n_rates * D]


class LeakyAverage(Layer):
    """Averages of the past with learned memories, read through a gate.

    h_t = a * h_{t-1} + (1 - a) * v_t, a in (0, 1);  y_t = o_proj(h_t * silu(z_t)),  v, z = in_proj(x)

    Cost: train O(T D), decode O(D) a token, state n_rates D values.

    Arguments: n_rates: averages for each feature. longest: tokens that the slowest of them remembers at first.
    """

    def __init__(self, d_model: int, *, n_rates: int = 2, longest: float = 100.0):
        super().__init__()
        if longest <= 1:
            raise UserError(f"LeakyAverage: longest is more than 1 token; got {longest}")
        width = n_rates * d_model
        self.in_proj = nn.Linear(d_model, 2 * width, bias=False)
        self.o_proj = nn.Linear(width, d_model, bias=False)
        memory = torch.linspace(1, longest, width)  # in tokens; a = memory / (1 + memory)
        self.memory_log = nn.Parameter(memory.log())

    def forward(
        self, x: Tensor, state: LeakyAverageState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LeakyAverageState | None]:
        v, z = self.in_proj(x).chunk(2, -1)
        v = v.to(accumulator_dtype(v.dtype))
        a = torch.sigmoid(self.memory_log.to(v.dtype)).expand_as(v)
        h, last = scan(a, (1 - a) * v, state=None if state is None else state.h, cu_seqlens=cu_seqlens)
        y = self.o_proj(h.to(z.dtype) * nn.functional.silu(z))
        return mask_padding(y, cu_seqlens), None if last is None else LeakyAverageState(last)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> LeakyAverageState:
        weight = self.memory_log
        h = torch.zeros(batch_size, len(weight), dtype=accumulator_dtype(dtype or weight.dtype), device=weight.device)
        return LeakyAverageState(h)
