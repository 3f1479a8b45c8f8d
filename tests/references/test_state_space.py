"""State-space and elementwise recurrent layers give others' numbers: transformers' mixers, layers around fla-core's
recurrences, and scipy's discretised systems."""

import re

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
import transformers
from fla.ops.hgrn.naive import naive_recurrent_hgrn
from matching import TIME, TOLERANCE, check, randomized
from torch import nn
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock
from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

from subquad.compare.cpu import torch_only
from subquad.kernels.backend import backend
from subquad.kernels.examples import relative_error
from subquad.layers import HGRN, RGLRU, RWKV4, S4, S4D, S5, Mamba, Mamba2, MinGRU
from subquad.layers.state_space import hippo_legs, hippo_normal

D = 48

MAMBA = {r"conv1d\.": "conv_", r"^D$": "skip", r"^b_layernorm": "B_norm", r"^c_layernorm": "C_norm"}
MAMBA |= {r"^dt_layernorm": "dt_norm"}
SIZES = {"vocab_size": 97, "hidden_size": D, "num_hidden_layers": 2, "pad_token_id": None}


@pytest.fixture(autouse=True, scope="module")
def plain_transformers():
    """No kernel package that happens to be installed stands between its torch code and the comparison."""
    with torch_only(), torch.no_grad():
        yield


def weights(theirs: nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Their weights under our names; those that we have none for are left out by an empty name."""
    found = {}
    for name, value in theirs.state_dict().items():
        for pattern, ours in names.items():
            name = re.sub(pattern, ours, name)
        found[name] = value.squeeze(1) if name == "conv_weight" else value
    found.pop("", None)
    return found


def test_falcon_mamba():
    config = transformers.FalconMambaConfig(**SIZES, state_size=8, time_step_rank=5, expand=2)
    theirs = randomized(FalconMambaMixer(config, 0, initialize_mixer_weights=False))
    ours = Mamba(D, d_state=8, dt_rank=5, dt_bc_norm="rms", norm_eps=config.mixer_rms_eps)
    ours.load_state_dict(weights(theirs, {**MAMBA, r"^(dt|b|c)_layernorm.*|^(dt|B|C)_norm.*": ""}))
    x = torch.randn(2, TIME, D)
    check(ours, x, theirs(x))


def test_jamba():
    config = transformers.JambaConfig(**SIZES, mamba_d_state=8, mamba_dt_rank=5, use_mamba_kernels=False)
    theirs = randomized(JambaMambaMixer(config, 0))
    ours = Mamba(D, d_state=8, dt_rank=5, dt_bc_norm="weighted", norm_eps=config.rms_norm_eps)
    ours.load_state_dict(weights(theirs, MAMBA))
    x = torch.randn(2, TIME, D)
    check(ours, x, theirs(x))


def test_bamba():
    config = transformers.BambaConfig(
        **SIZES, mamba_n_heads=6, mamba_d_head=16, mamba_d_state=12, mamba_n_groups=2, num_attention_heads=6
    )
    theirs = randomized(BambaMixer(config, 0))
    ours = Mamba2(D, d_state=12, head_dim=16, n_groups=2, norm_eps=config.rms_norm_eps)
    ours.load_state_dict(weights(theirs, MAMBA))
    x = torch.randn(2, TIME, D)
    check(ours, x, theirs(x))


def test_recurrent_gemma():
    config = transformers.RecurrentGemmaConfig(**SIZES, num_attention_heads=3, lru_width=60, conv1d_width=4)
    theirs = randomized(RecurrentGemmaRecurrentBlock(config, 0))
    ours = RGLRU(D, expand=1.25, n_heads=3)
    names = {"^linear_x": "x_proj", "^linear_y": "z_proj", "^linear_out": "o_proj", r"^conv_1d\.": "conv_"}
    names |= {"^rg_lru.recurrent_param": "decay", r"^rg_lru\.": ""}
    found = weights(theirs, names)
    gates = ("recurrent", "input")
    found["gate_weight"] = torch.stack([found.pop(f"{g}_gate_weight") for g in gates])
    found["gate_bias"] = torch.stack([found.pop(f"{g}_gate_bias").flatten() for g in gates])
    ours.load_state_dict(found)
    x = torch.randn(2, TIME, D)
    positions = torch.arange(TIME).expand(2, -1)
    check(ours, x, theirs(x, position_ids=positions, attention_mask=None, use_cache=False)[0])


def test_rwkv():
    """At batch 1: its states are wrong for more. Keys of size 20 make the running maximum matter."""
    config = transformers.RwkvConfig(**SIZES, attention_hidden_size=60)
    theirs = randomized(RwkvSelfAttention(config, 0))
    theirs.key.weight.mul_(20)
    ours = RWKV4(D, expand=1.25)
    names = {"^key": "k_proj", "^value": "v_proj", "^receptance": "r_proj", "^output": "o_proj"}
    found = weights(theirs, {**names, "^time_decay": "decay", "^time_first": "bonus"})
    mixes = [found.pop(f"time_mix_{s}").flatten() for s in ("receptance", "key", "value")]
    ours.load_state_dict({**found, "token_shift.mu": 1 - torch.stack(mixes)})
    x = torch.randn(1, TIME, D)
    check(ours, x, theirs(x)[0])


@pytest.mark.parametrize("bound", [0.0, 0.7])
def test_hgrn(bound):
    ours = HGRN(D, lower_bound=bound)
    randomized(ours)
    x = torch.randn(2, TIME, D)
    f = bound + (1 - bound) * ours.f_proj(x).sigmoid()
    h, _ = naive_recurrent_hgrn((1 - f) * F.silu(ours.i_proj(x)), f.log())
    h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.norm.weight
    check(ours, x, ours.o_proj(h * F.silu(ours.z_proj(x))))


def test_min_gru_equals_its_log_space_form():
    """The paper's appendix: logcumsumexp over cumulated logarithms, for positive candidates."""
    ours = randomized(MinGRU(D, positive=True).double())
    x = torch.randn(2, TIME, D, dtype=torch.float64)
    z, candidate = ours.z_proj(x), ours.h_proj(x)
    log_keep = F.logsigmoid(-z).cumsum(1)
    log_candidate = torch.where(candidate >= 0, (candidate.clamp(min=0) + 0.5).log(), F.logsigmoid(candidate))
    h = (log_keep + (F.logsigmoid(z) + log_candidate - log_keep).logcumsumexp(1)).exp()
    assert relative_error(ours(x)[0], ours.o_proj(h)) < 1e-10


def surrounded(layer: nn.Module, x: torch.Tensor, o: np.ndarray) -> torch.Tensor:
    """S4's and S4D's layer around the outputs of its systems."""
    return F.glu(layer.out_proj(F.gelu(torch.from_numpy(o) + layer.skip * x)), -1)


def dense_outputs(A, B, C, how: str, dt: float, u: np.ndarray) -> np.ndarray:
    """y_t = C x_t of the continuous system, discretised and run by scipy (whose outputs lag a step); u [T, inputs]."""
    a, b, *_ = scipy.signal.cont2discrete((A, B, C, np.zeros((len(C), B.shape[1]))), dt, method=how)
    return scipy.signal.dlsim((a, b, C @ a, C @ b, dt), u)[1]


@pytest.mark.parametrize("time", [100, 500])
def test_s4_is_the_dense_hippo_system(time):
    """Both below and above the length from which its convolution runs."""
    N = 12
    layer = S4(5, d_state=N).double()
    A, B = hippo_legs(N)
    _, V, _ = hippo_normal(N)
    C = torch.randn(5, N, dtype=torch.float64)
    layer.C.copy_(torch.view_as_real(C.to(V.dtype) @ V))
    layer.P.copy_(torch.view_as_real((V.mH @ (B / 2**0.5).to(V.dtype)).expand(5, -1)))  # unrounded: steps are many
    layer.B.copy_(torch.view_as_real((V.mH @ B.to(V.dtype)).expand(5, -1)))
    layer.frequency.copy_(hippo_normal(N)[0].imag.expand(5, -1))
    layer.decay_log.fill_(np.log(0.5))
    x = torch.randn(1, time, 5, dtype=torch.float64)
    steps = layer.log_dt.exp().tolist()
    outs = [
        dense_outputs(A.numpy(), B.numpy()[:, None], C[i : i + 1].numpy(), "bilinear", steps[i], x[0, :, i : i + 1])
        for i in range(5)
    ]
    expected = surrounded(layer, x, np.concatenate(outs, 1)[None])
    assert relative_error(layer(x)[0], expected) < 1e-9
    assert relative_error(layer.float()(x.float())[0], expected) < TOLERANCE


@pytest.mark.parametrize("how", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["legs", "inv", "lin"])
def test_s4d_is_a_diagonal_system(how, init):
    """As a real system: each mode and its conjugate a 2 x 2 block."""
    N = 8
    layer = S4D(3, d_state=N, init=init, discretization=how).double()
    w = torch.complex(-layer.decay_log.exp(), layer.frequency)
    C = torch.view_as_complex(layer.C)
    x = torch.randn(1, 300, 3, dtype=torch.float64)
    outs = []
    for i in range(3):
        A = torch.block_diag(*[torch.tensor([[m.real, -m.imag], [m.imag, m.real]]) for m in w[i]])
        B = torch.tensor([[1.0], [0.0]], dtype=torch.float64).repeat(N // 2, 1)
        out = 2 * torch.view_as_real(C[i].conj().resolve_conj()).reshape(1, -1)
        step = layer.log_dt[i].exp().item()
        outs.append(dense_outputs(A.numpy(), B.numpy(), out.numpy(), how, step, x[0, :, i : i + 1].numpy()))
    expected = surrounded(layer, x, np.concatenate(outs, 1)[None])
    assert relative_error(layer(x)[0], expected) < 1e-9
    assert relative_error(layer.float()(x.float())[0], expected) < TOLERANCE


def test_s5_is_the_dense_system_of_its_modes():
    """One step size for all modes, as scipy has it."""
    N = 8
    layer = S5(4, d_state=N, n_blocks=2).double()
    layer.log_dt.fill_(np.log(0.05))
    w = torch.complex(-layer.decay_log.exp(), layer.frequency)
    B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C)
    A, B, C = torch.diag(torch.cat([w, w.conj()])), torch.cat([B, B.conj()]), torch.cat([C, C.conj()])
    one = torch.eye(N // 2, dtype=A.dtype)
    basis = torch.cat([torch.cat([one, one], 1), torch.cat([-1j * one, 1j * one], 1)])  # twice real, imaginary part
    A, B, C = (t.real.numpy() for t in (basis @ A @ basis.inverse(), basis @ B, (C.mT @ basis.inverse())))
    x = torch.randn(1, TIME, 4, dtype=torch.float64)
    o = torch.from_numpy(dense_outputs(A, B, C, "zoh", 0.05, x[0].numpy())[None])
    u = F.gelu(o + layer.skip * x)
    expected = u * layer.gate_proj(u).sigmoid()
    assert relative_error(layer(x)[0], expected) < 1e-9
    assert relative_error(layer.float()(x.float())[0], expected) < TOLERANCE


@pytest.mark.parametrize("layer", [S4, S4D])
def test_convolution_equals_recurrence(layer):
    """At their full state size, over a length with many chunks and a last one that is not full."""
    ours = layer(6)
    x = torch.randn(1, 1500, 6)
    with backend("naive"):
        expected = ours.double()(x.double())[0]
    assert relative_error(ours.float()(x)[0], expected) < TOLERANCE
