"""The delta rule's ops and layers against fla-core's plain recurrences, transformers, and RWKV-7's equations."""

from math import exp

import pytest
import torch
import torch.nn.functional as F
import transformers
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.kda.naive import naive_recurrent_kda
from matching import TOLERANCE, check, randomized

from subquad.compare.cpu import torch_only
from subquad.kernels.delta_rule import delta_rule
from subquad.kernels.dplr_rule import dplr_rule
from subquad.kernels.examples import relative_error
from subquad.layers import GatedDeltaNet, KimiDeltaAttention
from subquad.models.lm import LM

B, T, H, K, V = 2, 130, 3, 16, 20


@pytest.fixture(autouse=True)
def plain():
    with torch_only(), torch.no_grad():
        yield


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def check_each(ours, theirs):
    for got, want in zip(ours, theirs, strict=True):
        assert relative_error(got, want) < TOLERANCE


def test_delta_rule():
    q, k, v, beta, S = torch.randn(B, T, H, K), unit(B, T, H, K), torch.randn(B, T, H, V), torch.rand(B, T, H), None
    S = torch.randn(B, H, K, V)
    o, last = delta_rule_recurrence(*(x.transpose(1, 2) for x in (q * K**0.5, k, v, beta)), initial_state=S)
    check_each(delta_rule(q, k, v, beta, state=S.clone()), (o.transpose(1, 2), last))


def test_gated_delta_rule():
    q, k, v, beta = torch.randn(B, T, H, K), unit(B, T, H, K), torch.randn(B, T, H, V), 1.9 * torch.rand(B, T, H)
    g, S = -3 * torch.rand(B, T, H), torch.randn(B, H, K, V)
    theirs = naive_recurrent_gated_delta_rule(q, k, v, beta, g, 1.0, S, True)
    check_each(delta_rule(q, k, v, beta, g, state=S.clone()), theirs)


def test_kimi_delta_rule_with_shared_keys():
    q, k, v, beta = torch.randn(B, T, 1, K), unit(B, T, 1, K), torch.randn(B, T, H, V), torch.rand(B, T, H)
    g, S = -3 * torch.rand(B, T, H, K), torch.randn(B, H, K, V)
    theirs = naive_recurrent_kda(q, k, v, g, beta, 1.0, S, True)
    check_each(delta_rule(q, k, v, beta, g, state=S.clone()), theirs)


@pytest.mark.parametrize("R", [2, 3])
def test_gated_delta_product(R):
    q, k, v = torch.randn(B, T, H, K), unit(B, T, R, H, K), torch.randn(B, T, R, H, V)
    beta, g, S = 1.9 * torch.rand(B, T, R, H), -3 * torch.rand(B, T, H), torch.randn(B, H, K, V)
    flat = (x.flatten(1, 2) for x in (k, v))
    theirs = naive_recurrent_gated_delta_product(q, *flat, g, beta.flatten(1, 2), 1.0, None, S, True, R)
    check_each(delta_rule(q, k, v, beta, g, state=S.clone()), theirs)


def test_dplr_rule():
    q, k, v, a = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V), unit(B, T, H, K)
    b, g, S = -a * torch.rand(B, T, H, K), -0.6 * torch.rand(B, T, H, K), torch.randn(B, H, K, V)
    o, last = dplr_recurrence(*(x.transpose(1, 2) for x in (q * K**0.5, k, v, a, b, g)), initial_state=S)
    check_each(dplr_rule(q, k, v, a, b, g, state=S.clone()), (o.transpose(1, 2), last))


def test_kimi_linear():
    """A prefill and single tokens against one forward of transformers' layer."""
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention  # not fla's kernels

    config = transformers.KimiLinearConfig(
        hidden_size=48, num_hidden_layers=1, linear_num_heads=3, linear_head_dim=16, layer_types=["linear_attention"]
    )
    theirs = randomized(KimiLinearDeltaAttention(config, 0))
    ours = KimiDeltaAttention(48, n_heads=3, head_dim=16, norm_eps=config.rms_norm_eps)
    w = theirs.state_dict()
    ours.load_state_dict(
        {
            "qkv_proj.weight": torch.cat([w[f"{x}_proj.weight"] for x in "qkv"]),
            "conv_weight": w["conv1d.weight"].squeeze(1),
            "a_proj.0.weight": w["forget_gate.f_a_proj.weight"],
            "a_proj.1.weight": w["forget_gate.f_b_proj.weight"],
            "z_proj.0.weight": w["g_a_proj.weight"],
            "z_proj.1.weight": w["g_b_proj.weight"],
            "A_log": w["forget_gate.A_log"].flatten(),
            "dt_bias": w["forget_gate.dt_bias"],
            "norm.weight": w["o_norm.weight"],
            **{name: w[name] for name in ("b_proj.weight", "o_proj.weight")},
        }
    )
    x = torch.randn(2, T, 48)
    check(ours, x, theirs(x))


@pytest.mark.parametrize("negative", [False, True])
def test_olmo_hybrid(negative):
    """Its gated delta layer, which doubles beta by default."""
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    config = transformers.OlmoHybridConfig(
        hidden_size=48,
        num_hidden_layers=2,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        linear_allow_neg_eigval=negative,
        layer_types=["linear_attention", "full_attention"],
    )
    theirs = randomized(OlmoHybridGatedDeltaNet(config, 0))
    ours = GatedDeltaNet(48, n_heads=3, head_dim=16, expand_v=1.5, negative_eigenvalues=negative, norm_eps=1e-5)
    w = theirs.state_dict()
    ours.load_state_dict(
        {
            "qkv_proj.weight": torch.cat([w[f"{x}_proj.weight"] for x in "qkv"]),
            "conv_weight": w["conv1d.weight"].squeeze(1),
            "z_proj.weight": w["g_proj.weight"],
            "norm.weight": w["o_norm.weight"],
            **{name: w[name] for name in ("A_log", "dt_bias", "a_proj.weight", "b_proj.weight", "o_proj.weight")},
        }
    )
    x = torch.randn(2, T, 48)
    check(ours, x, theirs(x))


def rwkv7(layer, x, first_value):
    """The paper's equations for one sequence [T, D], a token at a time, its state [V, K] a head; (y, v)."""
    heads, width = layer.n_heads, layer.head_dim
    S = torch.zeros(heads, width, width)
    before, ys, vs = torch.zeros_like(x[0]), [], []
    for t in range(len(x)):
        mixed = {name: torch.lerp(x[t], before, mu) for name, mu in zip("rkvgwa", layer.token_shift.mu, strict=True)}
        before = x[t]
        r, k, v = layer.r_proj.weight @ mixed["r"], layer.k_proj.weight @ mixed["k"], layer.v_proj.weight @ mixed["v"]

        def low_rank(part, row, act=lambda x: x):
            return part.up.weight @ act(part.down.weight @ row) + (0 if part.bias is None else part.bias)

        w = torch.exp(-exp(-0.5) * torch.sigmoid(low_rank(layer.w_proj, mixed["w"], torch.tanh)))
        a = torch.sigmoid(low_rank(layer.a_proj, mixed["a"]))
        gate = low_rank(layer.z_proj, mixed["g"], torch.sigmoid)
        vs.append(v)
        if first_value is not None:
            v = torch.lerp(v, first_value[t], torch.sigmoid(low_rank(layer.mix_proj, mixed["v"])))
        kappa = F.normalize((k * layer.k_unit).view(heads, width), dim=-1)
        k = k * torch.lerp(torch.ones_like(a), a, layer.k_rate)
        r, w, k, v, a = (x.view(heads, width) for x in (r, w, k, v, a))
        transition = torch.diag_embed(w) - kappa[:, :, None] * (a * kappa)[:, None, :]
        S = S @ transition + v[:, :, None] * k[:, None, :]
        p = (S @ r[:, :, None]).flatten()
        p = F.group_norm(p[None], heads, layer.norm.weight, layer.norm.bias, eps=64e-5)[0]
        p = p + ((r * layer.bonus * k).sum(-1, keepdim=True) * v).flatten()
        ys.append(layer.o_proj.weight @ (gate * p))
    return torch.stack(ys), torch.stack(vs)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_rwkv7_and_its_first_value(checkpointed):
    """Three blocks, the first without RWKV7: values travel from the second to the third."""
    mixer = {"name": "RWKV7", "head_dim": 8, "first_layer": 1}
    pattern = [{"ffn": {"name": "MLP", "d_ff": 32}}, {"mixer": mixer}, {"mixer": mixer}]
    model = randomized(LM.from_config({"d_model": 24, "vocab_size": 50, "blocks": [{"repeat": 1, "pattern": pattern}]}))
    tokens = torch.randint(50, (1, T))
    x, value = sum(model.blocks[0](model.embedding(tokens), None, None, None, {})[:2]), None
    for block in model.blocks[1:]:
        y, v = rwkv7(block.mixer, block.mixer_norm(x)[0], value)
        x, value = x + y, v if value is None else value
    want = model.head(model.norm(x))
    model.checkpoint_activations = checkpointed
    with torch.set_grad_enabled(checkpointed):
        assert relative_error(model(tokens)[0], want) < TOLERANCE
    state, parts = model.init_state(1, T), []
    for piece in (tokens[:, :70], tokens[:, 70:71], tokens[:, 71:]):
        out, state = model(piece, state)
        parts.append(out)
    assert relative_error(torch.cat(parts, 1), want) < TOLERANCE
