"""The step kernel against the naive forms of the three ops that it serves."""

from functools import partial

import pytest
import torch
from torch import Tensor

from subquad.kernels.backend import backend
from subquad.kernels.examples import Example, examples, relative_error
from subquad.kernels.triton.step import step
from subquad.kernels.wrapping import expand_decay

pytestmark = pytest.mark.unchecked
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPS = ["linear_attention", "delta_rule", "dplr_rule"]
TIMES = [1, 6]
drawn = [
    pytest.param(example, id=f"{op}: {example.name}, T = {time}")
    for op in OPS
    for time in TIMES
    for example in examples(op, time=time, dtype=torch.float32, device=DEVICE)
]


def arguments(example: Example) -> tuple[dict[str, Tensor], float | None]:
    """The step's own arguments but for the states, and the normaliser."""
    inputs = {**example.inputs, **example.options}
    decay, normalizer = inputs.pop("decay", None), inputs.pop("normalizer", None)
    v = inputs["v"]
    g = expand_decay(decay, v if v.dim() == 4 else v[:, :, 0])
    return {**inputs, "g": g, "normalized": normalizer is not None, "cu_seqlens": example.cu_seqlens}, normalizer


def taken(example: Example, in_place: bool) -> tuple[Tensor, list[Tensor]]:
    """(out, the new states) of the step."""
    given, normalizer = arguments(example)
    v = given["v"]
    N = v.shape[0] if example.cu_seqlens is None else example.cu_seqlens.numel() - 1
    shape = N, v.shape[-2], given["q"].shape[-1], v.shape[-1]
    state = example.state if isinstance(example.state, tuple) else (example.state,)
    before = [None if x is None else x.float().clone() for x in state]
    S, z = (*before, None)[:2]
    if in_place and S is not None:
        last, z_last = S, z
    else:
        last = torch.full(shape, float("nan"), device=v.device)
        z_last = last[..., 0].clone() if normalizer is not None else None
    out, den = step(**given, S=S, z=z, last=last, z_last=z_last)
    if normalizer is not None:
        out = out / den.abs().clamp(min=normalizer)[..., None].to(out.dtype)
    return out, [last] if z_last is None else [last, z_last]


def reference(example: Example) -> tuple[Tensor, list[Tensor] | None]:
    with backend("naive"), torch.no_grad():
        out, state = example.to(torch.float64).call()
    return out, None if state is None else list(state) if isinstance(state, tuple) else [state]


def check(example: Example, bound: float = BOUND[torch.float32], in_place: bool = False) -> None:
    out, states = taken(example, in_place)
    wanted, wanted_states = reference(example)
    assert relative_error(out, wanted) < bound
    for ours, theirs in zip(states, wanted_states or [], strict=wanted_states is not None):
        assert relative_error(ours, theirs) < bound


@pytest.mark.parametrize("example", drawn)
def test_against_the_naive_form(example):
    check(example)


@pytest.mark.parametrize("op", OPS)
def test_in_place_of_the_old_state(op):
    for example in examples(op, time=2, dtype=torch.float32, device=DEVICE):
        if example.state is not None:
            check(example, in_place=True)


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(op):
    for example in examples(op, time=1, dtype=torch.float32, device=DEVICE):
        if example.cu_seqlens is None:
            nothing = {name: x[:, :0] if x.dim() > 2 else x for name, x in example.inputs.items()}
            check(example._replace(inputs=nothing))


def test_strided_inputs_of_several_blocks():
    K, V, H = 40, 33, 2
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    q, k, v = (draw(3, width, H, 4).permute(0, 3, 2, 1).to(DEVICE) for width in (K, K, V))
    g, S = -draw(3, H, 4, K).abs().transpose(1, 2).to(DEVICE), draw(3, H, K, V).to(DEVICE)
    beta = draw(3, H, 4).sigmoid().transpose(1, 2).to(DEVICE)
    inputs = {"q": q, "k": torch.nn.functional.normalize(k, dim=-1), "v": v, "beta": beta, "decay": g}
    check(examples("delta_rule", time=4)[0]._replace(inputs=inputs, options={}, state=S), in_place=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's half precision")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_half_precision(op, dtype):
    for example in examples(op, time=5, dtype=torch.float32, device=DEVICE):
        state = example.state
        check(example.to(dtype)._replace(state=state), BOUND[dtype])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_in_a_cuda_graph():
    draw = partial(torch.randn, device=DEVICE)
    q, k, v, S = draw(2, 1, 3, 64), draw(2, 1, 3, 64), draw(2, 1, 3, 32), draw(2, 3, 64, 32)
    start = S.clone()
    step(q, k, v, None, S, last=S)
    S.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = step(q, k, v, None, S, last=S)
    for n in range(1, 4):
        graph.replay()
        wanted = start + n * k[:, 0, :, :, None] * v[:, 0, :, None]
        assert relative_error(S, wanted.double()) < 1e-5
        assert relative_error(out[:, 0], torch.einsum("bhk,bhkv->bhv", q[:, 0].double(), wanted.double())) < 1e-5
