"""Every layer of the zoo, and the variants that take another path through its code, against every property."""

import pytest

from subquad.layers import available, conformance

VARIANTS = {
    "attention-grouped-window-sinks": (
        "Attention",
        {
            "n_heads": 4,
            "n_kv_heads": 2,
            "window": 16,
            "n_sinks": 3,
            "qk_norm": True,
            "sink_logits": True,
            "rope_fraction": 0.5,
        },
    ),
    "attention-multi-query-window": (
        "Attention",
        {"n_heads": 3, "n_kv_heads": 1, "window": 8, "bias": True, "out_bias": True},
    ),
    "attention-sink-logits": ("Attention", {"n_heads": 4, "sink_logits": True, "rope_theta": None}),
    "attention-bidirectional": ("Attention", {"causal": False}),
    "attention-bidirectional-window": ("Attention", {"causal": False, "window": 9, "n_sinks": 2}),
    "linear-taylor": ("LinearAttention", {"feature_map": "taylor", "n_heads": 4, "feature_dim": 5}),
    "linear-softmax": ("LinearAttention", {"feature_map": "softmax", "normalizer": False}),
    "linear-relu-bidirectional": ("LinearAttention", {"feature_map": "relu", "causal": False, "bias": True}),
    "mamba2-groups": ("Mamba2", {"n_groups": 2, "head_dim": 16, "d_state": 12}),
    "gated-deltanet-negative": (
        "GatedDeltaNet",
        {"n_heads": 4, "n_key_heads": 2, "head_dim": 12, "expand_v": 2.0, "negative_eigenvalues": True},
    ),
    "moe-shared": ("MoE", {"n_shared": 1, "top_k": 3, "renormalize": False}),
}
SUBJECTS = {name: (name, {}) for name in available()} | VARIANTS


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request):
    name, arguments = SUBJECTS[request.param]
    return conformance.Subject(available()[name], arguments=arguments)


@pytest.mark.parametrize("prop", conformance.PROPERTIES)
def test_layer(subject, prop):
    try:
        conformance.PROPERTIES[prop](subject)
    except conformance.NotApplicableError as reason:
        pytest.skip(str(reason))
