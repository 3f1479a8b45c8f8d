"""What a user's code looks like to a type checker that reads the installed wheel. Run by test_wheel.py, under mypy.

`assert_type` fixes what the public signatures say; each `type: ignore` must be needed, so it fixes what they refuse.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor

import subquad
from subquad.kernels.backend import backend
from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.packing import pack, unpack
from subquad.layers import Layer, LinearAttention, Mamba2, SwiGLU, available
from subquad.models.checkpoint import load, save
from subquad.models.lm import LM, LMState

layer = LinearAttention(64, n_heads=4, feature_map="elu")
assert_type(layer(torch.zeros(1, 8, 64)), tuple[Tensor, Any])
assert_type(available(), dict[str, type[Layer]])
assert_type(subquad.__version__, str)
mixers: list[Layer] = [layer, Mamba2(64), SwiGLU(64, expand=2)]

row, cu_seqlens = pack(torch.zeros(2, 8, 64), torch.ones(2, 8, dtype=torch.bool))
assert_type(row, Tensor)
assert_type(unpack(row, torch.ones(2, 8, dtype=torch.bool)), Tensor)

with backend("torch"):
    q = torch.zeros(1, 8, 4, 16)
    out, _ = linear_attention(q, q, q)
    assert_type(out, Tensor)

model = LM.from_config({"d_model": 64, "blocks": [{"pattern": [{"mixer": "Mamba2"}]}]})
assert_type(model, LM)
state = model.init_state(1, 16)
assert_type(state, LMState)
assert_type(save(model, "model", overwrite=True), Path)
assert_type(load("model", dtype=torch.bfloat16), LM)
assert_type(subquad.load("model"), LM)

LinearAttention("64")  # type: ignore[arg-type]
LinearAttention(64, 4)  # type: ignore[call-arg]
LinearAttention(64, heads=4)  # type: ignore[call-arg]
LinearAttention(64, feature_map="gelu")  # type: ignore[arg-type]
LM.from_config(64)  # type: ignore[arg-type]
wrong: Iterator[int] = model.n_parameters()  # type: ignore[assignment]
