"""Our models give transformers' numbers: small models with random weights, mapped name by name.

The reference is always one forward over the whole sequence without a cache. transformers' own carried states are not
used: its Mamba-1 ignores them for several tokens at a time and its Mamba-2 decodes without the clamp of dt.
"""

import re

import pytest
import torch
import transformers
from matching import TIME, check, randomized
from torch import nn

from subquad.compare.cpu import torch_only
from subquad.layers import Attention, GatedDeltaNet, MoE
from subquad.models.lm import LM

SIZES = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "pad_token_id": None}

# Patterns in transformers' parameter names and what stands there in ours.
MAMBA = {
    r"^backbone\.embeddings": "embedding",
    r"^backbone\.norm_f": "norm",
    r"^backbone\.layers\.(\d+)\.norm": r"blocks.\1.mixer_norm",
    r"^backbone\.layers": "blocks",
    r"^lm_head": "head",
    r"conv1d\.": "conv_",
    r"mixer\.D$": "mixer.skip",
}
DECODER = {
    r"^model\.embed_tokens": "embedding",
    r"^model\.norm": "norm",
    r"^model\.layers": "blocks",
    r"^lm_head": "head",
    r"input_layernorm": "mixer_norm",
    r"post_attention_layernorm": "ffn_norm",
    r"self_attn|linear_attn": "mixer",
    r"\bmlp\b": "ffn",
    r"conv1d\.": "conv_",
    r"(^|mixer\.)out_proj": r"\1o_proj",
}
ATTENTION = {r"^dense": "o_proj", r"^sinks": "sink_logits"}
MOE = {
    r"\bgate\.weight": "router.weight",
    r"experts\.gate_up_proj$": "experts.gate_up",
    r"experts\.down_proj$": "experts.down",
}


@pytest.fixture(autouse=True, scope="module")
def plain_transformers():
    """No kernel package that happens to be installed stands between its torch code and the comparison."""
    with torch_only():
        yield


def mapped(theirs: nn.Module, names: dict[str, str], convert=lambda weights: weights) -> dict[str, torch.Tensor]:
    """transformers' weights under our names."""
    weights = {}
    for name, value in convert(theirs.state_dict()).items():
        for pattern, ours in names.items():
            name = re.sub(pattern, ours, name)
        weights[name] = value.squeeze(1) if name.endswith("conv_weight") else value
    return weights


def check_model(config, block: dict | list, names: dict[str, str], convert=lambda weights: weights, **fields) -> None:
    """Logits of a whole model; `block` is ours, repeated for every layer, or a list of all."""
    theirs = randomized(transformers.AutoModelForCausalLM.from_config(config))
    stage = {"pattern": block if isinstance(block, list) else [block] * config.num_hidden_layers}
    ours = LM.from_config(
        {
            "d_model": config.hidden_size,
            "vocab_size": config.vocab_size,
            "tie_embeddings": config.tie_word_embeddings,
            "blocks": [stage],
            **fields,
        }
    ).eval()
    ours.load_state_dict(mapped(theirs, names, convert))
    tokens = torch.randint(config.vocab_size, (2, TIME))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    check(ours, tokens, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_mamba(bias):
    config = transformers.MambaConfig(**SIZES, state_size=8, time_step_rank=5, use_bias=bias, use_conv_bias=not bias)
    mixer = {"name": "Mamba", "d_state": 8, "dt_rank": 5, "bias": bias, "conv_bias": not bias}
    check_model(config, {"mixer": mixer}, MAMBA)


@pytest.mark.parametrize("n_groups", [1, 3])
def test_mamba2(n_groups):
    # Step sizes before the clamp lie between about 0.001 and 0.5, so both limits bite.
    config = transformers.Mamba2Config(
        **SIZES,
        num_heads=6,
        head_dim=16,
        state_size=24,
        n_groups=n_groups,
        conv_kernel=3,
        chunk_size=32,
        time_step_limit=(0.005, 0.05),
        tie_word_embeddings=True,
    )
    mixer = {"name": "Mamba2", "d_state": 24, "head_dim": 16, "n_groups": n_groups, "d_conv": 3}
    check_model(config, {"mixer": {**mixer, "dt_limit": (0.005, 0.05)}}, MAMBA)


HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 80}


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
def test_attention_and_swiglu(family):
    """Grouped query heads; a window (Mistral); norms of queries and keys (Qwen3)."""
    extra = {"Mistral": {"sliding_window": 40}}.get(family, {})
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = getattr(transformers, f"{family}Config")(
        **SIZES, **HEADS, **extra, rms_norm_eps=1e-6, rope_parameters=rope, tie_word_embeddings=family == "Qwen3"
    )
    mixer = {"name": "Attention", "n_heads": 6, "n_kv_heads": 2, "rope_theta": 5000.0, "qk_norm": family == "Qwen3"}
    mixer["window"] = extra.get("sliding_window")
    check_model(config, {"mixer": mixer, "ffn": {"name": "SwiGLU", "d_ff": 80}}, DECODER, norm_eps=1e-6)


def qwen3_next_weights(config):
    """Undo the interleaving by key head, and the layer norms' scale by 1 + w (the gated norm scales by w)."""
    G, K, V = config.linear_num_key_heads, config.linear_key_head_dim, config.linear_value_head_dim
    R = config.linear_num_value_heads // G

    def convert(weights):
        out = {}
        for name, value in weights.items():
            prefix = name.rpartition("in_proj")[0]
            if name.endswith("in_proj_qkvz.weight"):
                parts = value.unflatten(0, (G, -1)).split([K, K, R * V, R * V], 1)
                q, k, v, z = (part.flatten(0, 1) for part in parts)
                out |= {f"{prefix}qkv_proj.weight": torch.cat([q, k, v]), f"{prefix}z_proj.weight": z}
            elif name.endswith("in_proj_ba.weight"):
                b, a = (part.flatten(0, 1) for part in value.unflatten(0, (G, -1)).split([R, R], 1))
                out |= {f"{prefix}b_proj.weight": b, f"{prefix}a_proj.weight": a}
            else:
                out[name] = 1 + value if "layernorm" in name or name == "model.norm.weight" else value
        return out

    return convert


def test_gated_deltanet():
    config = transformers.Qwen3NextConfig(
        **SIZES,
        intermediate_size=80,
        num_experts=0,
        layer_types=["linear_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        rms_norm_eps=1e-6,
    )
    mixer = {"name": "GatedDeltaNet", "n_heads": 6, "n_key_heads": 2, "head_dim": 8, "expand_v": 1.5}
    block = {"mixer": mixer, "ffn": {"name": "SwiGLU", "d_ff": 80}}
    check_model(config, block, DECODER, qwen3_next_weights(config), norm_eps=1e-6)


def test_gated_deltanet_with_strong_decay():
    """The layer alone, where a chunk's decay spans hundreds of nats."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = transformers.Qwen3NextConfig(
        **SIZES,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    theirs = randomized(Qwen3NextGatedDeltaNet(config, 0))
    with torch.no_grad():
        theirs.A_log.copy_(torch.tensor([-6.0, 0.0, 2.0, 3.5]))
    ours = GatedDeltaNet(48, n_heads=4, n_key_heads=2, head_dim=8)
    ours.load_state_dict(mapped(theirs, DECODER, qwen3_next_weights(config)))
    x = torch.randn(2, TIME, 48)
    with torch.no_grad():
        check(ours, x, theirs(x))


def test_mixtral():
    config = transformers.MixtralConfig(
        **SIZES, **HEADS, num_local_experts=6, num_experts_per_tok=2, sliding_window=None, rms_norm_eps=1e-5
    )
    mixer = {"name": "Attention", "n_heads": 6, "n_kv_heads": 2, "rope_theta": 1e6}
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    ffn = {"name": "MoE", "n_experts": 6, "top_k": 2, "d_ff": 80}
    check_model(config, {"mixer": mixer, "ffn": ffn}, {**DECODER, **MOE})


@pytest.mark.parametrize("ties", [False, True])
def test_mixtral_experts(ties):
    """Experts 2i and 2i+1 tie exactly and are the same: whichever of a pair comes third, the result is one."""
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(**SIZES, **HEADS, num_local_experts=8, num_experts_per_tok=3)
    theirs = randomized(MixtralSparseMoeBlock(config))
    if ties:
        with torch.no_grad():
            for p in theirs.parameters():
                p[1::2] = p[::2]
    ours = MoE(48, n_experts=8, top_k=3, d_ff=80)
    ours.load_state_dict(mapped(theirs, MOE))
    x = torch.randn(2, TIME, 48)
    with torch.no_grad():
        check(ours, x, theirs(x))


def test_shared_experts_and_plain_router_weights():
    """DeepSeek-V2: the top k are not renormalised, two shared experts serve every token."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = transformers.DeepseekV2Config(
        **SIZES,
        num_attention_heads=6,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        moe_intermediate_size=40,
        routed_scaling_factor=1.0,
        topk_method="greedy",
    )
    theirs = randomized(DeepseekV2Moe(config))
    ours = MoE(48, n_experts=8, top_k=3, d_ff=40, n_shared=2, renormalize=False)
    ours.load_state_dict(mapped(theirs, MOE))
    x = torch.randn(2, TIME, 48)
    with torch.no_grad():
        check(ours, x, theirs(x))


def causal_mask(window: int | None) -> torch.Tensor:
    gap = torch.arange(TIME)[:, None] - torch.arange(TIME)
    hidden = (gap < 0) | (gap >= (window or TIME))
    return torch.zeros(TIME, TIME).masked_fill(hidden, -torch.inf)[None, None]


@pytest.mark.parametrize("window", [None, 40])
def test_attention_sinks(window):
    """gpt-oss: a learned extra softmax column, biases everywhere, with and without a window."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    kind = "full_attention" if window is None else "sliding_attention"
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(
        **SIZES, **HEADS, sliding_window=window, layer_types=[kind] * 2, rope_parameters=rope, attention_bias=True
    )
    config._attn_implementation = "eager"
    theirs = randomized(GptOssAttention(config, 0))
    ours = Attention(48, n_heads=6, n_kv_heads=2, window=window, sink_logits=True, bias=True, out_bias=True)
    ours.load_state_dict(mapped(theirs, ATTENTION))
    x = torch.randn(2, TIME, 48)
    with torch.no_grad():
        angles = GptOssRotaryEmbedding(config)(x, torch.arange(TIME)[None])
        check(ours, x, theirs(x, position_embeddings=angles, attention_mask=causal_mask(window))[0])


def test_partial_rotary_embedding():
    """Phi turns a share of each head's features only."""
    from transformers.models.phi.modeling_phi import PhiAttention, PhiRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = transformers.PhiConfig(**SIZES, num_attention_heads=6, num_key_value_heads=3, rope_parameters=rope)
    config._attn_implementation = "eager"
    theirs = randomized(PhiAttention(config, 0))
    ours = Attention(48, n_heads=6, n_kv_heads=3, rope_fraction=0.5, bias=True, out_bias=True)
    ours.load_state_dict(mapped(theirs, ATTENTION))
    x = torch.randn(2, TIME, 48)
    with torch.no_grad():
        angles = PhiRotaryEmbedding(config)(x, torch.arange(TIME)[None])
        check(ours, x, theirs(x, position_embeddings=angles, attention_mask=causal_mask(None))[0])


def test_lfm2():
    """Gated short convolutions and attention with normed queries and keys; its final norm stands under another name."""
    kinds = ["conv", "full_attention", "conv"]
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.Lfm2Config(
        **SIZES | {"num_hidden_layers": 3},
        **{name: HEADS[name] for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")},
        block_auto_adjust_ff_dim=False,
        conv_L_cache=4,
        layer_types=kinds,
        rope_parameters=rope,
    )
    attention = {"name": "Attention", "n_heads": 6, "n_kv_heads": 2, "qk_norm": True, "norm_eps": config.norm_eps}
    mixers = {"conv": {"name": "GatedShortConv", "d_conv": 4}, "full_attention": attention}
    names = {
        r"^model\.embedding_norm": "norm",
        r"operator_norm": "mixer_norm",
        r"\.conv\.conv\.": ".mixer.conv_",
        r"\.conv\.": ".mixer.",
        r"([qk])_layernorm": r"\1_norm",
        r"self_attn\.out_proj": "mixer.o_proj",
        r"feed_forward\.w1": "ffn.gate_proj",
        r"feed_forward\.w3": "ffn.up_proj",
        r"feed_forward\.w2": "ffn.down_proj",
    }
    blocks = [{"mixer": mixers[kind], "ffn": {"name": "SwiGLU", "d_ff": 80}} for kind in kinds]
    plain = {name: ours for name, ours in DECODER.items() if "norm" not in name and "out_proj" not in name}
    check_model(config, blocks, {**names, **plain}, norm_eps=config.norm_eps)


def falcon_h1_weights(config):
    """The multipliers of its activations as factors of the weights before them."""
    inner, shared = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
    z, x, B, C, dt = config.ssm_multipliers
    sizes = [inner, inner, shared, shared, config.mamba_n_heads]
    stream = torch.cat([torch.full((n,), m) for n, m in zip(sizes, (z, x, B, C, dt), strict=True)])[:, None]
    gate, down = config.mlp_multipliers
    attention = config.attention_in_multiplier
    factors = {
        "embed_tokens.weight": config.embedding_multiplier,
        "lm_head.weight": config.lm_head_multiplier,
        "mamba.in_proj.weight": config.ssm_in_multiplier * stream,
        "mamba.out_proj.weight": config.ssm_out_multiplier,
        "self_attn.q_proj.weight": attention,
        "self_attn.k_proj.weight": attention * config.key_multiplier,
        "self_attn.v_proj.weight": attention,
        "self_attn.o_proj.weight": config.attention_out_multiplier,
        "feed_forward.gate_proj.weight": gate,
        "feed_forward.down_proj.weight": down,
    }

    def convert(weights):
        def factor(name):
            return next((f for end, f in factors.items() if name.endswith(end)), 1.0)

        return {name: value * factor(name) for name, value in weights.items()}

    return convert


@pytest.mark.parametrize("normed", [False, True])
def test_falcon_h1(normed):
    """Attention beside Mamba-2, their outputs summed."""
    config = transformers.FalconH1Config(
        **SIZES,
        **{name: HEADS[name] for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")},
        mamba_d_ssm=96,
        mamba_n_heads=6,
        mamba_d_head=16,
        mamba_d_state=12,
        mamba_n_groups=2,
        mamba_chunk_size=32,
        mamba_rms_norm=normed,
        mamba_norm_before_gate=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        embedding_multiplier=1.3,
        lm_head_multiplier=0.6,
        mlp_multipliers=[0.8, 1.4],
        key_multiplier=0.7,
        attention_in_multiplier=1.2,
        attention_out_multiplier=0.9,
        ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 0.7],
        ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.75,
    )
    mamba = {"name": "Mamba2", "d_state": 12, "head_dim": 16, "n_groups": 2, "norm": normed}
    mixers = [{"name": "Attention", "n_heads": 6, "n_kv_heads": 2}, {**mamba, "norm_eps": config.rms_norm_eps}]
    block = {"mixer": {"name": "Parallel", "mixers": mixers, "norm": False}, "ffn": {"name": "SwiGLU", "d_ff": 80}}
    names = {
        r"^model\.final_layernorm": "norm",
        r"input_layernorm": "mixer_norm",
        r"pre_ff_layernorm": "ffn_norm",
        r"feed_forward": "ffn",
        r"self_attn": "mixer.mixers.0",
        r"mamba\.": "mixer.mixers.1.",
        r"mixers\.1\.D$": "mixers.1.skip",
    }
    plain = {name: ours for name, ours in DECODER.items() if "out_proj" not in name and "norm" not in name}
    check_model(config, block, {**names, **plain}, falcon_h1_weights(config), norm_eps=config.rms_norm_eps)
