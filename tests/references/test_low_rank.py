"""Routers of mixtures and low-rank attention give transformers' numbers."""

import pytest
import torch
import transformers
from matching import TOLERANCE, check, randomized
from torch import nn

from subquad.compare.cpu import torch_only
from subquad.errors import UserError
from subquad.kernels.examples import relative_error
from subquad.kernels.latent_attention import absorbs
from subquad.layers import LatentAttention, LinformerAttention, MoE, NystromAttention
from subquad.layers.rotary import pairs_to_halves

D, TIME = 48, 90
SIZES = {"hidden_size": D, "num_attention_heads": 6, "moe_intermediate_size": 40, "hidden_act": "silu"}


@pytest.fixture(autouse=True, scope="module")
def plain_transformers():
    """No kernel package that happens to be installed stands between its torch code and the comparison."""
    with torch_only():
        yield


MOE = {
    "gate.weight": "router.weight",
    "gate.e_score_correction_bias": "router.balance_bias",
    "experts.gate_up_proj": "experts.gate_up",
    "experts.down_proj": "experts.down",
    "shared_expert_gate.weight": "shared_gate.weight",
}


@torch.no_grad()
def check_moe(ours: MoE, theirs: nn.Module) -> None:
    weights = {
        MOE.get(name, name).replace("shared_expert.", "shared_experts."): value
        for name, value in theirs.state_dict().items()
    }
    ours.load_state_dict(weights)
    x = torch.randn(2, TIME, D)
    assert relative_error(ours(x)[0], theirs(x)) < TOLERANCE


@pytest.mark.parametrize("renormalize", [False, True])
def test_gated_shared_expert(renormalize):
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = transformers.Qwen2MoeConfig(
        **SIZES, num_experts=8, num_experts_per_tok=3, shared_expert_intermediate_size=80, norm_topk_prob=renormalize
    )
    theirs = randomized(Qwen2MoeSparseMoeBlock(config))
    check_moe(MoE(D, n_experts=8, top_k=3, d_ff=40, n_shared=2, shared_gate=True, renormalize=renormalize), theirs)


@pytest.mark.parametrize("renormalize", [False, True])
def test_sigmoid_scores_groups_and_biases(renormalize):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        **SIZES,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=renormalize,
    )
    theirs = randomized(DeepseekV3MoE(config))
    theirs.gate.e_score_correction_bias.normal_(std=0.2)
    ours = MoE(
        D,
        n_experts=16,
        top_k=4,
        d_ff=40,
        score="sigmoid",
        n_groups=4,
        top_groups=2,
        scale=2.5,
        n_shared=1,
        balance_rate=1e-3,
        renormalize=renormalize,
    )
    check_moe(ours, theirs)


def test_groups_by_their_best_expert():
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = transformers.DeepseekV2Config(
        **SIZES,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        routed_scaling_factor=1.5,
        topk_method="group_limited_greedy",
    )
    theirs = randomized(DeepseekV2Moe(config))
    ours = MoE(
        D,
        n_experts=12,
        top_k=3,
        d_ff=40,
        n_groups=4,
        top_groups=2,
        group_score="max",
        scale=1.5,
        n_shared=1,
        renormalize=False,
    )
    check_moe(ours, theirs)


def test_gpt_oss():
    """Softmax over the top k logits, biases, and its clamped gate: inputs of this size reach both limits."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = transformers.GptOssConfig(
        hidden_size=D, intermediate_size=40, num_local_experts=8, num_experts_per_tok=3, swiglu_limit=7.0
    )
    theirs = randomized(GptOssMLP(config))
    w = theirs.state_dict()
    ours = MoE(D, n_experts=8, top_k=3, d_ff=40, gate="clamped", bias=True)
    halves = pairs_to_halves  # theirs interleaves gate and up
    ours.load_state_dict(
        {
            "router.weight": w["router.weight"],
            "router.bias": w["router.bias"],
            "experts.gate_up": halves(w["experts.gate_up_proj"]).mT,
            "experts.gate_up_bias": halves(w["experts.gate_up_proj_bias"]),
            "experts.down": w["experts.down_proj"].mT,
            "experts.down_bias": w["experts.down_proj_bias"],
        }
    )
    x = 6 * torch.randn(2, TIME, D)
    with torch.no_grad():
        check(ours, x, theirs(x)[0])


MLA = {
    "q_a_layernorm": "q_a_norm",
    "q_b_proj": "q_proj",
    "kv_a_proj_with_mqa": "kv_a_proj",
    "kv_a_layernorm": "kv_a_norm",
}


@pytest.mark.parametrize("q_rank", [None, 20])
@pytest.mark.parametrize("kv_rank", [4, 32])
@torch.no_grad()
def test_latent_attention(q_rank, kv_rank):
    """In one call, and token by token behind a prefill; a short latent is absorbed always, a long one in decoding."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = transformers.DeepseekV3Config(
        **SIZES,
        num_key_value_heads=6,
        q_lora_rank=q_rank,
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=10,
        qk_rope_head_dim=8,
        v_head_dim=12,
        rope_interleave=q_rank is None,
        attention_bias=q_rank is not None,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    config._attn_implementation = "eager"
    theirs = randomized(deepseek.DeepseekV3Attention(config, 0))
    ours = LatentAttention(
        D,
        n_heads=6,
        kv_lora_rank=kv_rank,
        q_lora_rank=q_rank,
        qk_nope_head_dim=10,
        qk_rope_head_dim=8,
        v_head_dim=12,
        rope_theta=5000.0,
        rope_interleave=q_rank is None,
        bias=q_rank is not None,
    )
    weights = {}
    for name, value in theirs.state_dict().items():
        part, _, kind = name.rpartition(".")
        weights[f"{MLA.get(part, part)}.{kind}"] = value
    ours.load_state_dict(weights)
    x = torch.randn(2, TIME, D)
    angles = deepseek.DeepseekV3RotaryEmbedding(config)(x, torch.arange(TIME)[None])
    future = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
    mask = torch.zeros(TIME, TIME).masked_fill(future, -torch.inf)[None, None]
    expected = theirs(x, position_embeddings=angles, attention_mask=mask)[0]
    check(ours, x, expected)


def test_few_tokens_absorb_and_many_expand():
    sizes = {"R": 512, "K": 128, "V": 128, "P": 64}
    assert absorbs(1, 4096, **sizes) and absorbs(64, 64_000, **sizes)
    assert not absorbs(4096, 4096, **sizes) and not absorbs(512, 64_000, **sizes)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_linformer_is_its_dense_formula(causal):
    """One dense softmax in float64: over E k and F v, or over the summaries of finished blocks and the own block."""
    heads, rank, time = 4, 5, 61
    length = 16 if causal else 80
    sizes = {"block": length} if causal else {"max_len": length}
    ours = LinformerAttention(D, n_heads=heads, causal=causal, rank=rank, rope_theta=None, **sizes).double()
    x = torch.randn(2, time, D, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    n_blocks = time // length if causal else 0
    combine = torch.zeros(2, n_blocks * rank if causal else rank, time, dtype=torch.float64)
    for i, e in enumerate((ours.e_k, ours.e_v)):
        if causal:
            combine[i, :, : n_blocks * length] = torch.block_diag(*[e] * n_blocks)
        else:
            combine[i] = e[:, :time]
    summary_k, summary_v = combine[0] @ k, combine[1] @ v
    scores = q @ summary_k.mT
    if causal:
        t = torch.arange(time)
        unfinished = t[:, None] // length <= torch.arange(n_blocks * rank) // rank
        elsewhere = (t[:, None] // length != t // length) | (t[:, None] < t)
        scores = torch.cat(
            [scores.masked_fill(unfinished, -torch.inf), (q @ k.mT).masked_fill(elsewhere, -torch.inf)], -1
        )
        summary_v = torch.cat([summary_v, v], 2)
    o = (scores / (D // heads) ** 0.5).softmax(-1) @ summary_v
    expected = o.transpose(1, 2).flatten(2) @ ours.o_proj.weight.T
    torch.testing.assert_close(ours(x)[0], expected)


def test_linformer_says_where_its_projections_end():
    layer = LinformerAttention(D, causal=False, max_len=10)
    with pytest.raises(UserError, match="serve up to 10 tokens; 11 do not fit"):
        layer(torch.randn(1, 11, D))
    cu_seqlens = torch.tensor([0, 10, 20], dtype=torch.int32)
    assert layer(torch.randn(1, 20, D), None, cu_seqlens)[0].isfinite().all()
    layer = LinformerAttention(D, block=4)
    with pytest.raises(UserError, match="2 blocks of 4; 12 tokens do not fit"):
        layer(torch.randn(1, 12, D), layer.init_state(1, 8))


@pytest.mark.parametrize("landmarks", [8, 64])
@pytest.mark.parametrize("width", [None, 5])
@torch.no_grad()
def test_nystromformer(landmarks, width):
    """It has landmarks for sequences of one length, a multiple of theirs, and is exact where both are the same."""
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    time, heads = 64, 4
    config = transformers.NystromformerConfig(
        hidden_size=D,
        num_attention_heads=heads,
        num_landmarks=landmarks,
        segment_means_seq_len=time,
        conv_kernel_size=width or 1,
    )
    theirs = randomized(NystromformerSelfAttention(config))
    theirs.conv_kernel_size = width
    theirs.init_option = "exact"  # its other way starts from the largest norm in the batch: sequences would mix
    ours = NystromAttention(D, n_heads=heads, n_landmarks=landmarks, d_conv=width, rope_theta=None, bias=True)
    for name in ("query", "key", "value"):
        getattr(ours, f"{name[0]}_proj").load_state_dict(getattr(theirs, name).state_dict())
    ours.o_proj.weight.copy_(torch.eye(D))
    if width is not None:
        ours.conv_weight.copy_(theirs.conv.weight[:, 0, :, 0])
    x = torch.randn(3, time, D)
    assert relative_error(ours(x)[0], theirs(x)[0]) < TOLERANCE


@torch.no_grad()
def test_nystrom_attention_has_no_state():
    layer = NystromAttention(D)
    assert not hasattr(layer, "init_state")
    with pytest.raises(UserError, match="cannot go on from a state"):
        layer(torch.randn(1, 4, D), ())


@pytest.mark.parametrize(("width", "time"), [(33, 5), (33, 12), (65, 12), (3, 1)])
def test_nystrom_trains_on_less_than_its_filter_spans(width, time):
    """In float32, where the gradient of torch 2.13's conv2d writes past its memory."""
    layer = NystromAttention(32, d_conv=width)
    for _ in range(10):
        layer(torch.randn(2, time, 32))[0].square().sum().backward()
    assert layer.conv_weight.grad.isfinite().all()
