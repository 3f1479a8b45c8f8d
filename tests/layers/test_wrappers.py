"""Other people's wrappers take effect in every layer: adapters, quantisers, parametrisations, data parallelism."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from subquad import configs
from subquad.errors import UserError
from subquad.infer.generate import generate
from subquad.infer.state import load_state, save_state
from subquad.kernels.state import leaves
from subquad.layers import available
from subquad.layers.base import convert, parameters_with
from subquad.models.checkpoint import save
from subquad.models.lm import LM
from subquad.train.task import parameter_groups

D, T = 48, 16


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


DTYPES = [torch.float32, slow(torch.bfloat16)]


def build(name, dtype=torch.float32):
    """A layer whose parameters are all away from special values such as zero."""
    layer = available()[name](D)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return convert(layer, dtype).eval()


def linears(module):
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def difference(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def bound(layer, dtype):
    """Of one way of computing against another; a layer that chooses may choose otherwise at a near-tie."""
    return 1e-4 if dtype == torch.float32 else 0.3 if layer.discrete else 0.06


@torch.no_grad()
def in_two_pieces(layer, x):
    state = layer.init_state(len(x), x.shape[1])
    first, state = layer(x[:, : T // 2], state)
    return torch.cat([first, layer(x[:, T // 2 :], state)[0]], 1)


def adapted(layer):
    """The layer with a LoRA adapter on every Linear, whose weights are not zero."""
    holder = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    targets = [f"layer.{name}" for name in linears(layer)]
    inject_adapter_in_model(LoraConfig(r=4, target_modules=targets), holder)
    with torch.no_grad():
        for name, p in holder.named_parameters():
            if "lora_" in name:
                p.add_(0.05 * torch.randn_like(p))
    return holder["layer"].eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", available())
def test_lora_on_every_linear(name, dtype):
    """Each adapter gets gradients and changes the output; with a state and merged they compute the same."""
    plain, x = build(name, dtype), torch.randn(2, T, D, dtype=dtype)
    layer = adapted(plain)
    y = layer(x)[0]
    assert y.dtype == dtype
    (y.float() * torch.randn(y.shape)).sum().backward()
    y = y.detach()
    for adapter in linears(plain):
        second = layer.get_submodule(adapter).lora_B["default"].weight
        assert second.grad is not None and second.grad.abs().sum() > 0, adapter
        with torch.no_grad():
            kept = second.clone()
            second.zero_()
            assert not torch.equal(layer(x)[0], y), adapter
            second.copy_(kept)
    if hasattr(layer, "init_state"):
        assert difference(in_two_pieces(layer, x), y) < bound(plain, dtype)
    for adapter in linears(plain):
        layer.get_submodule(adapter).merge()
    assert difference(layer(x)[0].detach(), y) < bound(plain, dtype)


def test_lora_on_a_whole_model():
    """PEFT's own entry point, and back to a plain model."""
    model = LM.from_config(configs.folder() / "mla.yaml").eval()
    tokens = torch.randint(256, (1, T))
    # Merged into a tied head, an adapter would change the embedding too.
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", exclude_modules=["head"]))
    assert parameters_with(peft, "no_decay") == {f"base_model.model.{n}" for n in parameters_with(model, "no_decay")}
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
        adapted_logits = peft(tokens)[0]
        merged = peft.merge_and_unload()
        assert difference(merged(tokens)[0], adapted_logits) < 1e-4
        state = merged.init_state(1, T)
        assert difference(merged(tokens, state)[0], adapted_logits) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", available())
@torch.no_grad()
def test_int8_weights_of_torchao(name, dtype):
    plain, x = build(name, dtype), torch.randn(2, T, D, dtype=dtype)
    layer = copy.deepcopy(plain)
    quantize_(layer, Int8WeightOnlyConfig(version=2))
    y = layer(x)[0]
    assert y.dtype == dtype and 0 < difference(y, plain(x)[0]) < (0.3 if plain.discrete or name == "Hyena" else 0.1)
    if hasattr(layer, "init_state"):
        assert difference(in_two_pieces(layer, x), y) < bound(plain, dtype)


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def weight_only(model):
    quantize_(model, Int8WeightOnlyConfig(version=2))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", [dynamic, weight_only])
def test_a_quantised_model_generates_and_keeps_its_states(tmp_path, quantize):
    config = configs.folder() / "mla.yaml"
    model, other = (quantize(LM.from_config(config).eval()) for _ in range(2))
    whole = generate(model, "the ", max_new_tokens=6)
    assert isinstance(whole, str)
    with torch.no_grad():
        state = model(torch.randint(256, (1, 5)), model.init_state(1, 9))[1]
    save_state(tmp_path / "state", model, state)
    read, _ = load_state(tmp_path / "state", model)
    for (path, kind, a), (_, _, b) in zip(leaves(read), leaves(state), strict=True):
        assert torch.equal(a, b[:, : a.shape[1]] if kind == "append" else b), path
    with pytest.raises(UserError, match="another model"):
        load_state(tmp_path / "state", other)
    with pytest.raises(UserError, match="before it is quantised"):
        save(model, tmp_path / "model")


@pytest.mark.parametrize("name", available())
def test_hooks_and_parametrisations_of_every_linear(name):
    """A hook sees each Linear called, with and without a state; a reparametrised weight is the one that counts."""
    layer, x = build(name), torch.randn(2, T, D)
    y = layer(x)[0].detach()
    called, handles = [], []
    for linear in linears(layer):
        part = layer.get_submodule(linear)
        handles.append(part.register_forward_hook(lambda module, inputs, output, linear=linear: called.append(linear)))
    assert difference(layer(x)[0].detach(), y) < 1e-4
    assert set(called) == set(linears(layer))
    if hasattr(layer, "init_state"):
        called.clear()
        assert difference(in_two_pieces(layer, x), y) < 1e-4
        assert set(called) == set(linears(layer))
    for handle in handles:
        handle.remove()
    magnitudes = [
        parametrizations.weight_norm(layer.get_submodule(linear)).parametrizations.weight.original0
        for linear in linears(layer)
    ]
    assert difference(layer(x)[0].detach(), y) < 1e-4
    (layer(x)[0] * torch.randn(y.shape)).sum().backward()
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in magnitudes)


@pytest.mark.parametrize("name", available())
def test_functional_call_replaces_every_parameter(name):
    """Each parameter that is given takes the place of the layer's own, and none of the layer's own is read."""
    layer, other, x = build(name), build(name), torch.randn(2, T, D)
    own = layer(x)[0].detach()
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(0.01 * torch.randn_like(tensor))
        wanted = other(x)[0]
        given = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        assert torch.equal(functional_call(layer, given, (x,))[0], wanted)
    assert torch.equal(layer(x)[0], own)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [slow("deepseek_moe"), "griffin", slow("hymba"), slow("rwkv7")])
def test_data_parallel_training(name, process_group):
    model, tokens = LM.from_config(configs.folder() / f"{name}.yaml"), torch.randint(256, (2, T))
    wanted, _ = copy.deepcopy(model)(tokens)
    for wrapper in (nn.DataParallel(model), nn.parallel.DistributedDataParallel(model)):
        assert parameters_with(wrapper, "no_decay") == {f"module.{n}" for n in parameters_with(model, "no_decay")}
        sizes = [len(group["params"]) for group in parameter_groups(wrapper, 0.1)]
        assert sizes == [len(group["params"]) for group in parameter_groups(model, 0.1)]
        optimizer = torch.optim.SGD(wrapper.parameters(), lr=1e-3)
        for step in range(2):
            logits = wrapper(tokens)[0]
            assert step or difference(logits.detach(), wanted.detach()) < 1e-5
            logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        wanted = model(tokens)[0].detach()


def test_a_swapped_class_and_new_parameters_keep_facts():
    """As torch's fully_shard does: the class becomes a subclass of itself, parameters become other tensors."""
    layer = build("Mamba2")
    names, groups = parameters_with(layer, "no_decay"), [len(g["params"]) for g in parameter_groups(layer, 0.1)]
    for part in layer.modules():
        part.__class__ = type(f"Sharded{type(part).__name__}", (type(part),), {})
        for key, value in list(part._parameters.items()):
            if value is not None:
                setattr(part, key, nn.Parameter(value.detach().clone()))
    assert parameters_with(layer, "no_decay") == names
    assert [len(g["params"]) for g in parameter_groups(layer, 0.1)] == groups
    assert {n for n, p in convert(layer, torch.bfloat16).named_parameters() if p.dtype == torch.float32} == {
        "A_log",
        "dt_bias",
    }
