"""Our models give transformers' numbers: small models with random weights, mapped name by name.

The reference is always one forward over the whole sequence without a cache. transformers' own carried states are not
used: its Mamba-1 ignores them for several tokens at a time and its Mamba-2 decodes without the clamp of dt.
"""

import re

import pytest
import torch
import transformers
from torch import nn

from subquad.compare.cpu import torch_only
from subquad.kernels.examples import relative_error
from subquad.layers import Attention, GatedDeltaNet, MoE
from subquad.models.lm import LM

TOLERANCE = 1e-5  # float32
TIME, PREFILL = 130, 70  # across two chunks of 64, and a prefill that ends within one
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


def randomized(module: nn.Module) -> nn.Module:
    """No weight at its initial value: norms, biases, A_log, dt_bias and D are moved, matrices keep a signal's size."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name == "sinks":
                p.normal_()
            elif p.dim() == 1 or name.endswith("A_log"):
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.normal_(std=1.0 if "embed" in name else p.shape[-1] ** -0.5)
    return module.eval()


def mapped(theirs: nn.Module, names: dict[str, str], convert=lambda weights: weights) -> dict[str, torch.Tensor]:
    """transformers' weights under our names."""
    weights = {}
    for name, value in convert(theirs.state_dict()).items():
        for pattern, ours in names.items():
            name = re.sub(pattern, ours, name)
        weights[name] = value.squeeze(1) if name.endswith("conv_weight") else value
    return weights


@torch.no_grad()
def check(ours: nn.Module, inputs: torch.Tensor, expected: torch.Tensor) -> None:
    """One call, and a prefill followed by single tokens."""
    assert relative_error(ours(inputs)[0], expected) < TOLERANCE
    state = ours.init_state(inputs.shape[0], TIME)
    pieces = [inputs[:, :PREFILL], *inputs[:, PREFILL:].split(1, 1)]
    outs = []
    for piece in pieces:
        out, state = ours(piece, state)
        outs.append(out)
    assert relative_error(torch.cat(outs, 1), expected) < TOLERANCE


def check_model(config, block: dict, names: dict[str, str], convert=lambda weights: weights, **fields) -> None:
    """Logits of a whole model; `block` is ours, repeated for every layer."""
    theirs = randomized(transformers.AutoModelForCausalLM.from_config(config))
    stage = {"repeat": config.num_hidden_layers, "pattern": [block]}
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
