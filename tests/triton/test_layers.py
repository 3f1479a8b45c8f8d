"""Layers over ops with a Triton form: the same outputs, states and gradients as their float64 definition."""

import copy

import pytest
import torch

from subquad.kernels.backend import backend
from subquad.kernels.state import leaves, map_leaves
from subquad.layers import available
from subquad.layers.conformance import Subject, error

pytestmark = pytest.mark.unchecked
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = ("GatedDeltaNet", "MLSTM", "Mamba2", "RWKV6", "RWKV7")  # under the interpreter
OPS = ("linear_attention", "delta_rule", "dplr_rule", "short_conv", "running_max", "shift")
MIXERS = [
    name for name, layer in available().items()
    if layer.kind == "mixer" and any(op in layer.card.op for op in OPS) and (DEVICE == "cuda" or name in FEW)
]  # fmt: skip
SIZES = {"d_model": 16, "time": 9} if DEVICE == "cpu" else {"d_model": 64, "time": 150}


@pytest.fixture(params=MIXERS)
def subject(request):
    layer = available()[request.param]
    width = max(SIZES["d_model"], getattr(layer, "min_width", 1))
    return Subject(layer, width)


def on_device(layer, dtype):
    return copy.deepcopy(layer).to(DEVICE, dtype)


def trained(form, layer, x, state):
    """Output, state and gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    with backend(form):
        y, state = layer(x, state)
        loss = sum(t.double().square().sum() for t in (y, *(t for _, kind, t in leaves(state) if kind == "recurrent")))
        found = torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
    return [y, *(t for _, _, t in leaves(state)), *(torch.zeros(1) if g is None else g for g in found)]


def test_training_with_a_state(subject):
    x = subject.inputs(2, SIZES["time"]).to(DEVICE)
    results = {}
    for form, dtype in (("triton", torch.float32), ("naive", torch.float32), ("oracle", torch.float64)):
        layer = on_device(subject.layer, dtype)
        state = layer.init_state(2, 2 * SIZES["time"]) if subject.decodes else None
        results[form] = trained("naive" if form == "oracle" else form, layer, x.to(dtype), state)
    for ours, naive, oracle in zip(*results.values(), strict=True):
        assert error(ours, oracle) <= max(2e-5, 3 * error(naive, oracle))


def test_packed_and_one_by_one(subject):
    if not subject.decodes:
        pytest.skip("it reads the whole sequence at once")
    layer, T = on_device(subject.layer, torch.float32), SIZES["time"]
    x = subject.inputs(1, T).to(DEVICE, torch.float32)
    rows = torch.tensor([0, T // 3, T // 3, T], dtype=torch.int32, device=DEVICE)
    with torch.no_grad(), backend("triton"):
        packed, ends = layer(x, layer.init_state(3, 2 * T), rows)
        for n, (start, end) in enumerate([(0, T // 3), (T // 3, T)]):
            state = layer.init_state(1, 2 * T)
            addresses = [t.data_ptr() for _, _, t in leaves(state)]
            alone = []
            for t in range(start, end):
                y, state = layer(x[:, t : t + 1], state)
                alone.append(y)
            assert error(packed[:, start:end], torch.cat(alone, 1)) < 1e-4
            assert [t.data_ptr() for _, _, t in leaves(state)] == addresses
            end_state = map_leaves(ends, lambda path, kind, t, n=n: t[2 * n : 2 * n + 1])
            for (path, _, one), (_, _, other) in zip(leaves(end_state), leaves(state), strict=True):
                assert error(one, other) < 1e-4, path


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_graph_replays_a_step(subject):
    if not subject.decodes:
        pytest.skip("it reads the whole sequence at once")
    if subject.discrete:
        pytest.skip("it chooses on the host")
    layer = on_device(subject.layer, torch.float32)
    x = subject.inputs(2, 6).to(DEVICE, torch.float32)
    with torch.no_grad():
        state, eager = layer.init_state(2, 32), []
        for t in range(6):
            y, state = layer(x[:, t : t + 1], state)
            eager.append(y.clone())
        state, token = layer.init_state(2, 32), x[:, :1].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                layer(token, layer.init_state(2, 32))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = layer(token, state)
        for t in range(6):  # capturing ran nothing
            token.copy_(x[:, t : t + 1])
            graph.replay()
            assert error(y, eager[t]) < 1e-5
