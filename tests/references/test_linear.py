"""Kernel and linear attention give others' numbers: transformers' layers, and layers around fla-core's recurrences."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from fla.ops.based.naive import naive_parallel_based
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.retention.naive import naive_retention
from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from matching import TIME, TOLERANCE, check, randomized
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

from subquad.kernels.examples import relative_error
from subquad.kernels.linear_attention import linear_attention
from subquad.layers import (
    HGRN2,
    MLSTM,
    RWKV5,
    RWKV6,
    GatedLinearAttention,
    LightningAttention,
    LinearAttention,
    Retention,
)

D, H = 48, 4

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (H, -1))


@pytest.mark.parametrize("layer_idx", [0, 1, 2])
def test_minimax(layer_idx):
    config = transformers.MiniMaxConfig(
        hidden_size=D, num_hidden_layers=3, num_attention_heads=H, head_dim=8, block_size=32
    )
    theirs = randomized(MiniMaxLightningAttention(config, layer_idx))
    ours = LightningAttention(D, n_heads=H, head_dim=8, layer_idx=layer_idx, n_layers=3)
    names = {"out_proj": "o_proj", "output_gate": "z_proj"}
    ours.load_state_dict(
        {
            f"{names.get(stem, stem)}.weight": getattr(theirs, stem).weight
            for stem, _ in theirs.named_children()
            if stem != "act_fn"
        }
    )
    x = torch.randn(2, TIME, D)
    check(ours, x, theirs(x, None, None)[0])


@pytest.mark.parametrize("strength", [1.0, 20.0], ids=["mild", "capped"])
def test_xlstm(strength):
    """Without their eps on the divisor, which is exp(-m) or more anyway. `strength` takes the gates to their caps."""
    config = transformers.xLSTMConfig(
        hidden_size=128, num_hidden_layers=1, num_heads=H, vocab_size=97, chunk_size=16, eps=0.0
    )
    theirs = randomized(xLSTMLayer(config))
    for gate in (theirs.igate_preact, theirs.fgate_preact):
        gate.weight.mul_(strength)
    names = {
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "igate_preact": "i_proj",
        "fgate_preact": "f_proj",
        "ogate_preact": "out_gate",
        "multihead_norm": "norm",
        "out_proj": "o_proj",
    }
    ours = MLSTM(128, n_heads=H)
    split = [(name.partition("."), value) for name, value in theirs.state_dict().items()]
    ours.load_state_dict({f"{names[stem]}.{leaf}": value for (stem, _, leaf), value in split})
    x = torch.randn(2, TIME, 128)
    check(ours, x, theirs(x)[0])


def test_gla():
    ours = randomized(GatedLinearAttention(D, n_heads=H))
    x = torch.randn(2, TIME, D)
    q, k, v = (heads(p(x)) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    gate = heads(x @ ours.gate_down.weight.T @ ours.gate_up.weight.T + ours.gate_up.bias)
    o, _ = naive_recurrent_gla(q, k, v, F.logsigmoid(gate) / 16)
    o = F.rms_norm(o, (D // H,), ours.norm.weight, 1e-5) * F.silu(heads(ours.z_proj(x)))
    check(ours, x, ours.o_proj(o.flatten(2)))


@pytest.mark.parametrize("bound", [0.0, 0.6])
def test_hgrn2(bound):
    ours = randomized(HGRN2(D, head_dim=D // H, lower_bound=bound))
    x = torch.randn(2, TIME, D)
    q, f, v = (heads(p(x)) for p in (ours.q_proj, ours.f_proj, ours.v_proj))
    f = bound + (1 - bound) * f.sigmoid()
    o, _ = naive_recurrent_gla(F.silu(q) * (D // H) ** 0.5, 1 - f, v, f.log())
    check(ours, x, ours.o_proj(F.rms_norm(o.flatten(2), (D,), ours.norm.weight, 1e-5)))


def test_retention():
    ours = randomized(Retention(D, n_heads=H))
    x = torch.randn(2, TIME, D)

    def turned(x: torch.Tensor) -> torch.Tensor:
        """As complex numbers, in float64."""
        first, second = heads(x).double().chunk(2, -1)
        rates = 10000.0 ** -(torch.arange(0, D // H, 2, dtype=torch.float64) / (D // H))
        angles = torch.arange(TIME)[:, None, None] * rates
        z = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], -1).float()

    q, k, v = turned(ours.q_proj(x)), turned(ours.k_proj(x)), heads(ours.v_proj(x))
    o = naive_retention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    o = F.layer_norm(o, o.shape[-1:], eps=1e-6).flatten(2) * F.silu(ours.z_proj(x))
    check(ours, x, ours.o_proj(o))


def rwkv_output(ours, streams, g, x_z):
    """What follows the mixing of tokens, the same in both versions."""
    r, k, v = (
        heads(p(t)).transpose(1, 2) for p, t in zip((ours.r_proj, ours.k_proj, ours.v_proj), streams, strict=True)
    )
    o, _ = naive_recurrent_rwkv6(r, k, v, g.transpose(1, 2), ours.bonus, scale=1.0)
    o = F.group_norm(o.transpose(1, 2).reshape(-1, D) / 8, H, ours.norm.weight, ours.norm.bias, 1e-5).view(2, TIME, D)
    return ours.o_proj(o * F.silu(ours.z_proj(x_z)))


def test_rwkv5():
    ours = randomized(RWKV5(D, head_dim=D // H))
    x = torch.randn(2, TIME, D)
    before = F.pad(x, (0, 0, 1, -1))
    mu_r, mu_k, mu_v, mu_z = 1 - ours.token_shift.mu  # the share of the current token, as the authors write it
    x_r, x_k, x_v, x_z = (x * mu + before * (1 - mu) for mu in (mu_r, mu_k, mu_v, mu_z))
    g = -ours.w.exp().expand(2, TIME, H, D // H)
    check(ours, x, rwkv_output(ours, (x_r, x_k, x_v), g, x_z))


def test_rwkv6():
    ours = randomized(RWKV6(D, head_dim=D // H, mix_rank=5, decay_rank=7))
    x = torch.randn(2, TIME, D)
    change = F.pad(x, (0, 0, 1, -1)) - x
    shift = ours.token_shift
    inner = torch.tanh((x + change * shift.mu[0]) @ shift.down.weight.T).unflatten(-1, (5, -1))
    delta = torch.einsum("btsr,srd->sbtd", inner, shift.up)
    x_r, x_k, x_v, x_z, x_w = (x + change * (mu + d) for mu, d in zip(shift.mu[1:], delta, strict=True))
    w = ours.w.bias + torch.tanh(x_w @ ours.w.down.weight.T) @ ours.w.up.weight.T
    check(ours, x, rwkv_output(ours, (x_r, x_k, x_v), heads(-w.exp()), x_z))


def test_based():
    ours = randomized(LinearAttention(D, n_heads=H, feature_map="taylor", feature_dim=6))
    x = torch.randn(2, TIME, D)
    o = naive_parallel_based(*(heads(p(x)).transpose(1, 2) for p in (ours.q_proj, ours.k_proj, ours.v_proj)))
    check(ours, x, ours.o_proj(o.transpose(1, 2).flatten(2)))


def test_linear_attention():
    ours = randomized(LinearAttention(D, n_heads=H))
    x = torch.randn(2, TIME, D)
    q, k, v = (heads(p(x)) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    o, _ = naive_recurrent_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=True)
    check(ours, x, ours.o_proj(o.flatten(2)))


def test_scalar_decay():
    """The op with a decay a token and head."""
    q, k, v = (torch.randn(2, TIME, H, n) for n in (5, 5, 7))
    g = -3 * torch.rand(2, TIME, H)
    assert (
        relative_error(linear_attention(q, k, v, g)[0], naive_recurrent_simple_gla(q, k, v, g, scale=1.0)[0])
        < TOLERANCE
    )
