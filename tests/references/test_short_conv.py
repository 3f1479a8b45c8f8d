"""LFM2's gated short convolution gives transformers' numbers, at once and token by token."""

import pytest
import torch
import transformers
from matching import check

from subquad.compare.cpu import torch_only
from subquad.layers import GatedShortConv


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_lfm2(bias):
    with torch_only():
        from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

        config = transformers.Lfm2Config(hidden_size=48, num_hidden_layers=2, conv_L_cache=3, conv_bias=bias)
        theirs = Lfm2ShortConv(config, 0).eval()
    ours = GatedShortConv(48, d_conv=3, bias=bias)
    names = {"conv.weight": "conv_weight", "conv.bias": "conv_bias"}
    weights = theirs.state_dict()
    ours.load_state_dict({names.get(k, k): w.squeeze(1) if k == "conv.weight" else w for k, w in weights.items()})
    x = torch.randn(2, 90, 48)
    with torch_only():
        expected = theirs(x)
    check(ours, x, expected)
