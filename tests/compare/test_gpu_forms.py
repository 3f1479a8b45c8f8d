"""Which form a GPU would run of every op of every shipped configuration, and of the widths that others published."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from subquad import configs
from subquad.compare.costs import forward
from subquad.compare.models import find_config
from subquad.models.config import LMConfig
from subquad.models.lm import LM

# Ops without a Triton form: torch's own fused attention, and what is still made of plain torch.
IN_TORCH = {
    *("attention", "latent_attention", "linformer_attention", "native_sparse_attention", "nystrom_attention"),
    *("sparse_attention", "topk_attention", "bucket_attention"),
    *("scan", "selective_scan", "lti", "long_conv", "grouped_mlp"),
}
# Mixers at the widths of checkpoints that no shipped configuration has: (width of the model, mixer, widths K and V).
PUBLISHED = {
    "gla-1.3b": (2048, {"name": "GatedLinearAttention", "n_heads": 4, "expand_k": 0.5, "expand_v": 1.0}, (256, 512)),
    "retnet-1.3b": (2048, {"name": "Retention", "n_heads": 8, "expand_v": 2.0}, (256, 512)),
    "xlstm-7b": (4096, {"name": "MLSTM", "n_heads": 8}, (256, 512)),
    "based-1b": (1792, {"name": "LinearAttention", "n_heads": 16, "feature_map": "taylor"}, (273, 112)),
}


def forms(config: LMConfig) -> tuple[dict[str, set[str]], set[tuple[int, int]]]:
    """(op -> what a GPU would run of its calls, widths (K, V) of the matrix states), without a value or a GPU."""
    once = replace(config, blocks=[{"pattern": stage["pattern"]} for stage in config.blocks])
    with torch.device("meta"):
        model = LM(once).to(torch.bfloat16)
        calls = forward(partial(model, torch.zeros(1, 256, dtype=torch.long)))[2]
    found: dict[str, set[str]] = {}
    for call in calls:
        found.setdefault(call.op, set()).add(call.on_gpu)
    matrix = ("linear_attention", "delta_rule", "dplr_rule")
    return found, {(call.args[0].shape[-1], call.args[2].shape[-1]) for call in calls if call.op in matrix}


@pytest.mark.parametrize("name", [name for name in configs.names() if not name.startswith("recall/")])
def test_no_width_of_a_shipped_configuration_leaves_the_kernels(name):
    found, _ = forms(find_config(name))
    for op, ran in found.items():
        assert ran == ({"torch: there is no Triton form"} if op in IN_TORCH else {"triton"}), (name, op, ran)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_widths_stay_in_the_kernels(name):
    d_model, mixer, widths = PUBLISHED[name]
    found, matrix = forms(LMConfig.from_dict({"d_model": d_model, "blocks": [{"pattern": [{"mixer": mixer}]}]}))
    assert matrix == {widths}
    assert found["linear_attention"] == {"triton"}


def test_what_leaves_them_says_why():
    mixer = {"name": "DeltaNet", "n_heads": 2, "head_dim": 320}
    found, _ = forms(LMConfig.from_dict({"d_model": 640, "blocks": [{"pattern": [{"mixer": mixer}]}]}))
    assert found["delta_rule"] == {"torch: the Triton form does not take keys of width 320, above 256"}
