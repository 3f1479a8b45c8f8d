"""Facts about parameters follow from classes, so they survive everything that re-creates tensors and modules."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from subquad import configs
from subquad.layers import Facts, available
from subquad.layers.base import convert, covers, declared, parameters_with
from subquad.models.config import LMConfig
from subquad.models.lm import LM
from subquad.train.task import parameter_groups

FACTS = ("no_decay", "float32", "residual", "keeps_init")
# Arguments that make what a layer has by choice only.
CHOICES = {
    "Attention": {"sink_logits": True},
    "LinearAttention": {"feature_map": "performer"},
    "MLP": {"activation": "relu2"},
    "MoE": {"balance_rate": 1e-3},
    "RWKV7": {"layer_idx": 1, "n_layers": 2},
}
# Matrices that multiply the features of a token, besides those of nn.Linear: all that weight decay is for.
MATRICES = {"gate_up", "down", "gate_weight", "up", "e_k", "e_v", "q_weight", "k_weight"}
FEW = ("deepseek_moe", "demo", "griffin", "hyena", "hymba", "mla", "rwkv7", "s4")  # the others are slow tests
MODELS = [
    pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in configs.names() if "/" not in name
]


def build(name):
    return available()[name](64, **CHOICES.get(name, {}))


def facts_of(module):
    return {fact: parameters_with(module, fact) for fact in FACTS}


def spared(module):
    """Names of what the optimiser does not decay."""
    kept = {id(p) for p in parameter_groups(module, 0.1)[1]["params"]}
    return {name for name, p in module.named_parameters() if id(p) in kept}


def recreated(module):
    """(how, module) for each way of torch to make all tensors anew."""
    yield "deepcopy", copy.deepcopy(module)
    yield "pickle", pickle.loads(pickle.dumps(module))
    yield "to_empty", copy.deepcopy(module).to("meta").to_empty(device="cpu")
    assigned = copy.deepcopy(module)
    assigned.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    yield "assign", assigned


@pytest.mark.parametrize("name", available())
def test_facts_survive_new_tensors(name):
    layer = build(name)
    for how, new in recreated(layer):
        assert facts_of(new) == facts_of(layer) and spared(new) == spared(layer), how


def test_what_classes_declare_exists():
    """A misspelt name would declare nothing: each is an attribute of some layer's."""
    missing, found = set(), set()
    for part in (part for name in available() for part in build(name).modules()):
        own = {*part._parameters, *part._buffers, *part._modules}
        for cls in type(part).__mro__:
            for fact in FACTS:
                for name in getattr(vars(cls).get("facts"), fact, ()):
                    (found if name in own else missing).add((cls, fact, name))
    assert found and missing <= found


@pytest.mark.parametrize("name", available())
def test_matrices_decay_and_nothing_else(name):
    layer = build(name)
    linear = {f"{n}.weight" for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    matrices = {n for n, p in layer.named_parameters() if p.dim() > 1 and n.rpartition(".")[2] in MATRICES} | linear
    assert set(dict(layer.named_parameters())) - spared(layer) == matrices


@pytest.mark.parametrize("name", available())
def test_into_the_residual_stream_leads_one_projection(name):
    """What the layer's output is made by, which the model scales with its depth; S5 and mixtures have none."""
    layer = build(name)
    last = {n for n, m in layer.named_modules() if isinstance(m, nn.Linear) and covers(declared(layer, "residual"), n)}
    wanted = {n for n, _ in layer.named_modules() if n.rpartition(".")[2] in ("o_proj", "out_proj", "down_proj")}
    assert last == wanted and (last or name in ("S5", "MoE"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_facts_outputs_and_ties(name):
    model = LM.from_config(configs.folder() / f"{name}.yaml").eval()
    tokens = torch.randint(256, (1, 5))
    with torch.no_grad():
        before = model(tokens)[0]
        for how, new in recreated(model):
            assert facts_of(new) == facts_of(model) and spared(new) == spared(model), how
            assert (new.head.weight is new.embedding.weight) == model.config.tie_embeddings, how
            assert how == "to_empty" or torch.equal(new(tokens)[0], before), how


class Wrapped(nn.Module):
    """A wrapper of a module, as adapters, compilers and data parallelism make them."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def test_facts_are_found_within_wrappers():
    layer = available()["Mamba"](32)
    wrapped = Wrapped(layer)
    assert parameters_with(wrapped, "no_decay") == {f"inner.{name}" for name in parameters_with(layer, "no_decay")}
    layer.out_proj = Wrapped(layer.out_proj)
    assert covers(declared(layer, "residual"), "out_proj.inner")
    parametrize.register_parametrization(layer, "A_log", nn.Identity())
    assert "parametrizations.A_log.original" in parameters_with(layer, "no_decay")
    assert "parametrizations.A_log.original" not in set(dict(layer.named_parameters())) - spared(layer)


class Foreign(nn.Module):
    """Anyone's mixer, derived from nothing of ours."""

    facts = Facts(no_decay=("rate",), float32=("rate", "inner"), residual=("last",), keeps_init=("first",))

    def __init__(self, d_model: int):
        super().__init__()
        self.rate = nn.Parameter(torch.rand(d_model, 3))
        self.first, self.inner = nn.Linear(d_model, d_model, bias=False), nn.Linear(d_model, d_model)
        self.last = nn.Linear(d_model, d_model, bias=False)
        nn.init.eye_(self.first.weight)

    def forward(self, x, state=None, cu_seqlens=None):
        return self.last(self.first(x)), state


class ForeignChild(Foreign):
    facts = Facts(no_decay=("filter",))

    def __init__(self, d_model: int):
        super().__init__(d_model)
        self.filter = nn.Parameter(torch.rand(d_model, 3))


def test_anyones_layer_declares_facts(monkeypatch):
    assert spared(ForeignChild(8)) == {"rate", "filter", "inner.bias"}
    monkeypatch.setattr("subquad.layers.build.find_layer", lambda where, name: Foreign)
    model = LM(LMConfig(64, [{"repeat": 8, "pattern": [{"mixer": {"name": "anyone.Foreign"}}]}], init_std=0.02))
    for block in model.blocks:
        assert torch.equal(block.mixer.first.weight, torch.eye(64))
        assert block.mixer.inner.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert block.mixer.last.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    convert(model, torch.bfloat16)
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == parameters_with(model, "float32")


@pytest.mark.parametrize("name", available())
def test_convert_spares_what_stays_float32(name):
    layer = build(name)
    before = copy.deepcopy(layer.state_dict())
    stays = parameters_with(layer, "float32")
    half = convert(copy.deepcopy(layer), torch.bfloat16).state_dict()
    for key, value in half.items():
        assert torch.equal(value, before[key] if key in stays else before[key].bfloat16()), key
        assert value.dtype == (torch.float32 if key in stays else torch.bfloat16), key
    assert all(t.dtype == torch.float64 for t in convert(layer, torch.float64).state_dict().values())
