"""Every layer of the zoo, and the variants that take another path through its code, against every property."""

import pytest

from subquad.layers import available, conformance

SUMMARIES = {"name": "summaries", "stride": 8, "width": 2}
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
    "latent-queries": (
        "LatentAttention",
        {"n_heads": 4, "kv_lora_rank": 9, "q_lora_rank": 10, "v_head_dim": 7, "rope_interleave": True, "bias": True},
    ),
    "latent-absorbed-no-rope": ("LatentAttention", {"n_heads": 4, "kv_lora_rank": 3, "rope_theta": None}),
    "linformer-small-blocks": ("LinformerAttention", {"block": 7, "rank": 3, "share_kv": True, "rope_theta": None}),
    "linformer-bidirectional": ("LinformerAttention", {"causal": False, "rank": 20, "bias": True}),
    "nystrom-few-landmarks": ("NystromAttention", {"n_landmarks": 6, "d_conv": None, "rope_theta": None, "bias": True}),
    "linear-taylor": ("LinearAttention", {"feature_map": "taylor", "n_heads": 4, "feature_dim": 5}),
    "linear-softmax": ("LinearAttention", {"feature_map": "softmax", "normalizer": False}),
    "linear-performer": ("LinearAttention", {"feature_map": "performer", "n_features": 40}),
    "linear-cosformer": ("LinearAttention", {"feature_map": "cosformer", "horizon": 1100}),
    "linear-cosformer-bidirectional": ("LinearAttention", {"feature_map": "cosformer", "causal": False}),
    "linear-hedgehog": ("LinearAttention", {"feature_map": "hedgehog"}),
    "linear-relu-bidirectional": ("LinearAttention", {"feature_map": "relu", "causal": False, "bias": True}),
    "mamba-normed": ("Mamba", {"dt_bc_norm": "weighted"}),
    "mingru-positive": ("MinGRU", {"positive": True, "bias": True}),
    "hgrn-bounded": ("HGRN", {"lower_bound": 0.6}),
    "hgrn2-bound": ("HGRN2", {"lower_bound": 0.4}),
    "hyena-order-3": ("Hyena", {"order": 3, "max_len": 1100, "n_features": 5, "filter_width": 16, "sine": 4.0}),
    "mlstm-wide-values": ("MLSTM", {"n_heads": 2, "expand_v": 2.0, "gate_soft_cap": 5.0}),
    "s4d-inv-bilinear": ("S4D", {"init": "inv", "discretization": "bilinear", "d_state": 6}),
    "s4d-lin": ("S4D", {"init": "lin", "d_state": 10}),
    "s5-blocks-bilinear": ("S5", {"n_blocks": 4, "d_state": 24, "discretization": "bilinear"}),
    "mamba2-groups": ("Mamba2", {"n_groups": 2, "head_dim": 16, "d_state": 12}),
    "deltanet-elu-sum": ("DeltaNet", {"feature_map": "elu", "qk_norm": "sum", "output_gate": True, "expand_v": 1.5}),
    "gated-deltaproduct-3": ("GatedDeltaProduct", {"n_heads": 4, "n_factors": 3, "decay": False}),
    "kda-wide": ("KimiDeltaAttention", {"n_heads": 3, "head_dim": 10, "expand_v": 1.5, "rank": 7, "d_conv": 3}),
    "gated-deltanet-negative": (
        "GatedDeltaNet",
        {"n_heads": 4, "n_key_heads": 2, "head_dim": 12, "expand_v": 2.0, "negative_eigenvalues": True},
    ),
    "parallel-sum": (
        "Parallel",
        {"mixers": ["LinearAttention", {"name": "Attention", "n_heads": 3}, "GatedShortConv"], "norm": False},
    ),
    "gated-short-conv-wide": ("GatedShortConv", {"d_conv": 5, "bias": True}),
    "rwkv7-channel-mix": ("RWKVChannelMix", {"gated": False, "layer_idx": 1, "n_layers": 3}),
    "moe-shared": ("MoE", {"n_shared": 1, "top_k": 3, "renormalize": False, "shared_gate": True}),
    "moe-sigmoid-groups": (
        "MoE",
        {"score": "sigmoid", "n_groups": 4, "top_groups": 2, "balance_rate": 1e-3, "scale": 2.5, "z_loss": 1e-3},
    ),
    "moe-expert-choice": ("MoE", {"routing": "expert_choice", "n_experts": 5, "capacity_factor": 1.7}),
    "sparse-bigbird": (
        "SparseAttention",
        {"n_heads": 4, "n_kv_heads": 2, "pattern": {"name": "bigbird", "block": 8, "span": 6, "n_global": 8}},
    ),
    "sparse-fixed": ("SparseAttention", {"pattern": {"name": "sparse_transformer", "stride": 16}, "bias": True}),
    "sparse-strided": ("SparseAttention", {"pattern": {"name": "sparse_transformer_strided", "stride": 16}}),
    "sparse-dilated": (
        "SparseAttention",
        {"n_heads": 4, "pattern": [{"name": "dilated_window", "window": 9, "dilation": [1, 2, 2, 5]}, SUMMARIES]},
    ),
    "sparse-bidirectional": (
        "SparseAttention",
        {
            "causal": False,
            "n_heads": 4,
            "n_kv_heads": 2,
            "pattern": [
                {"name": "longformer", "window": 9, "n_global": 3},
                {"name": "strided", "stride": 20},
                {"name": "random_blocks", "block": 8, "n_blocks": 2, "span": 5},
            ],
        },
    ),
    "topk-grouped": ("TopKAttention", {"n_heads": 4, "n_kv_heads": 2, "block": 8, "bias": True}),
    "nsa-grouped": (
        "NativeSparseAttention",
        {"n_heads": 4, "n_kv_heads": 2, "block": 8, "top_k": 4, "window": 10, "bias": True},
    ),
    "lsh-small": ("LSHAttention", {"n_heads": 2, "n_buckets": 4, "window": 6, "bias": True}),
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
