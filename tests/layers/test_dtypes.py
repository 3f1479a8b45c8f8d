"""Every layer and model in the dtypes people use: autocast, half precision with float32 facts, wider ones, int8."""

import copy
import warnings

import pytest
import torch
from torch import nn

from subquad import configs
from subquad.kernels.state import leaves
from subquad.layers import available
from subquad.layers.base import convert, device_of, dtype_of, parameters_with, placement
from subquad.models.lm import LM


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


SMALL = [name for name in configs.names() if "/" not in name]
FEW = (
    "deepseek_moe",
    "demo",
    "griffin",
    "hyena",
    "hymba",
    "lfm2",
    "mla",
    "rwkv7",
)  # most kinds of layers; the rest slow
MODELS = [name if name in FEW else slow(name) for name in SMALL]
CACHES = ("append", "ring")
D, T = 48, 24


def build(name):
    return available()[name](D)


def small_model(name):
    return LM.from_config(configs.folder() / f"{name}.yaml").eval()


def loss_of_digits(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check(layer, x, dtype, reference=None):
    """Trains and decodes in two pieces; outputs and caches have `dtype`, what accumulates is at least float32."""
    y, _ = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in layer.parameters())
    discrete = getattr(layer, "discrete", False)  # may choose otherwise at a near-tie
    assert reference is None or loss_of_digits(y, reference) < (0.3 if discrete else 0.05)
    if not hasattr(layer, "init_state"):
        return
    with torch.no_grad():
        state = layer.init_state(len(x), T)
        first, state = layer(x[:, : T // 2], state)
        second, state = layer(x[:, T // 2 :], state)
    assert first.dtype == second.dtype == dtype
    assert loss_of_digits(torch.cat([first, second], 1), y.detach()) < (0.3 if discrete else 0.05)
    for path, kind, t in leaves(state):
        if kind in CACHES or path.rpartition(".")[2] in ("conv", "shift", "last", "x"):  # kept as they came
            assert t.dtype == dtype, path
        elif kind != "count" and t.dtype != torch.int64:
            assert t.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128), (path, t.dtype)


@pytest.mark.parametrize("mixed", [False, slow(True)])
@pytest.mark.parametrize("name", available())
def test_autocast_gives_its_dtype(name, mixed):
    """Modules in float32 and in bf16, inputs in the same dtype or in the other."""
    layer, x = build(name), torch.randn(2, T, D)
    reference = layer(x)[0].detach()
    for module, given in ((layer, x), (convert(copy.deepcopy(layer), torch.bfloat16), x.bfloat16())):
        if mixed:
            given = given.bfloat16() if given.dtype == torch.float32 else given.float()
        with torch.autocast("cpu", torch.bfloat16):
            check(module, given, torch.bfloat16, reference)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float16, torch.float64))]
)
@pytest.mark.parametrize("name", available())
def test_a_converted_layer_computes_in_its_dtype(name, dtype):
    layer, x = build(name), torch.randn(2, T, D)
    reference = layer(x)[0].detach()
    check(convert(layer, dtype), x.to(dtype), dtype, reference)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", available())
def test_torchs_own_conversion_computes_in_its_dtype(name, dtype):
    """Which rounds everything, rates too."""
    check(build(name).to(dtype), torch.randn(2, T, D).to(dtype), dtype)


@pytest.mark.parametrize("name", MODELS)
def test_models_in_half_precision_and_under_autocast(name):
    model, tokens = small_model(name), torch.randint(256, (1, T))
    half = convert(copy.deepcopy(model), torch.bfloat16)
    assert {n for n, p in half.named_parameters() if p.dtype == torch.float32} <= parameters_with(half, "float32")
    assert dtype_of(half) == torch.bfloat16
    assert half(tokens)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens)[0].dtype == torch.bfloat16


def quantized(module):
    """torch's own dynamic int8: its modules hold no parameters, and `weight` is a method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(module).eval(), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dynamic_int8_models_read_and_decode(name):
    model, tokens = small_model(name), torch.randint(256, (2, T))
    int8 = quantized(model)
    logits, reference = int8(tokens)[0], model(tokens)[0]
    parts = [part for block in model.blocks for part in (block.mixer, block.ffn) if part is not None]
    bound = 2.0 if any(part.discrete for part in parts) else 0.6  # 8 bits, and other choices at near-ties
    assert loss_of_digits(logits, reference) < bound and not torch.equal(logits, reference)
    if not all(hasattr(part, "init_state") for part in parts):
        return
    state = int8.init_state(2, T)
    pieces = []
    for piece in tokens.split([T - 1, 1], 1):
        out, state = int8(piece, state)
        pieces.append(out)
    assert loss_of_digits(torch.cat(pieces, 1), logits) < bound


def test_every_linear_is_quantised():
    """Exact nn.Linear modules are exchanged; what must not be, gates, filters and routers, is no such module."""
    for name in available():
        kept = [type(m).__name__ for m in quantized(build(name)).modules() if isinstance(m, nn.Linear)]
        assert set(kept) <= {"WideLinear", "Router"}, name


def test_placement_without_a_tensor():
    assert placement(nn.Identity()) == (torch.float32, torch.device("cpu"))
    assert placement(nn.Identity(), torch.float64)[0] == torch.float64
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    with torch.autocast("cpu", torch.bfloat16):
        assert placement(nn.Linear(2, 2))[0] == torch.bfloat16 and dtype_of(nn.Linear(2, 2)) == torch.float32
