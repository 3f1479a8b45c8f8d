"""Small models of every architecture with random weights, in float64."""

import pytest
import torch

from subquad.models.lm import LM

MIXERS = {
    "linear": {"name": "LinearAttention", "n_heads": 2},
    "mamba": {"name": "Mamba", "d_state": 4},
    "mamba2": {"name": "Mamba2", "d_state": 8, "head_dim": 8},
    "delta": {"name": "GatedDeltaNet", "n_heads": 2},
    "attention": {"name": "Attention", "n_heads": 4, "n_kv_heads": 2},
    "window": {"name": "Attention", "n_heads": 4, "window": 6, "n_sinks": 2},
}
ARCHITECTURES = [*MIXERS, "hybrid"]


def build(architecture: str, *, seed: int = 0, **config) -> LM:
    """A two-layer model of this kind; its weights are large enough for its texts to wander."""
    if architecture == "hybrid":
        pattern = [
            {"mixer": MIXERS["mamba2"], "ffn": {"name": "MoE", "n_experts": 4, "top_k": 2, "d_ff": 16}},
            {"mixer": MIXERS["attention"], "ffn": "SwiGLU"},
        ]
    else:
        pattern = [{"mixer": MIXERS[architecture], "ffn": {"name": "SwiGLU", "d_ff": 16}}] * 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        values = {"d_model": 16, "blocks": [{"pattern": pattern}], "init_std": 0.5, "tie_embeddings": False}
        return LM.from_config(values | config).double().eval()


@pytest.fixture(scope="session")
def models():
    """One model of each architecture, by name; tests only read them."""
    return {name: build(name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def small():
    """Builds a model by the name of its architecture."""
    return build


@pytest.fixture(params=ARCHITECTURES)
def model(request, models):
    return models[request.param]
