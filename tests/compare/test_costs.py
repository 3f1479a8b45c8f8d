"""Counted costs: the ops' formulas against torch's counter on the ops themselves, layers by hand."""

import random
from functools import partial

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from subquad.compare.costs import count, count_op, counter, forward, mixing, on_meta
from subquad.errors import UserError
from subquad.kernels import costs
from subquad.kernels.backend import backend, recorded_calls
from subquad.kernels.examples import examples, load_ops
from subquad.kernels.scan import scan
from subquad.layers import SwiGLU, available
from subquad.models.lm import LM

FLOAT = torch.float32
ONE_OF_EACH_OP = {layer.card.op: name for name, layer in available().items() if name not in ("Parallel", "MoE")}


def test_every_op_has_a_formula():
    assert set(costs.OPS) == set(load_ops()) | {"shift"}


@pytest.mark.parametrize("op", load_ops())
def test_formulas_count_the_products_that_torch_sees(op):
    for time in (1, 391):
        for example in examples(op, time=time, dtype=FLOAT):
            if example.cu_seqlens is not None or (op == "linformer_attention" and time == 1 and example.state is None):
                continue  # torch multiplies one token elementwise
            example = example if op == "grouped_mlp" else example.to("meta")  # which reads who chose whom
            with torch.no_grad(), backend("torch"), counter() as seen, recorded_calls() as calls:
                out, state = example.call()
            (call,) = calls
            assert costs.cost(call).products == seen.get_total_flops(), (time, example.name)
            with torch.no_grad(), recorded_calls(costs.results):
                assert shapes(example.call()) == shapes((out, state)), (time, example.name)


def shapes(tree):
    return [(x.shape, x.dtype) for x in pytree.tree_leaves(tree) if x is not None]


@pytest.mark.parametrize("name", ONE_OF_EACH_OP.values())
def test_layers_of_random_shapes_cost_what_torch_sees_and_scans(name):
    draw = random.Random(name)
    d_model, tokens, batch = 16 * draw.randint(1, 4), draw.randint(2, 200), draw.randint(1, 3)
    layer = available()[name](d_model)
    model = on_meta(layer, FLOAT)
    if hasattr(layer, "init_state"):
        with torch.no_grad(), torch.device("meta"):
            model(torch.empty(1, 1, d_model), model.init_state(1, 1))  # keeps what is computed once
    for phase, new in (("train", tokens), ("prefill", tokens), ("decode", 1)):
        if phase == "decode" and not hasattr(layer, "init_state"):
            continue
        with torch.device("meta"), torch.set_grad_enabled(phase == "train"), backend("torch"):
            x = torch.empty(batch, new, d_model, requires_grad=phase == "train")
            state = None
            if phase != "train" and hasattr(layer, "init_state"):
                state = model.init_state(batch, tokens + (phase == "decode"))
            with counter() as seen, recorded_calls() as calls:
                y, _ = model(x, state)
            products, scans = seen.get_total_flops(), sum(costs.cost(call).scans for call in calls)
            flops, _ = count(layer, phase, batch, tokens, d_model, FLOAT)
            assert flops == (3 if phase == "train" else 1) * (products + scans)
            if phase == "train":
                with counter() as backward:
                    y.backward(torch.empty_like(y))
                assert 1.6 < backward.get_total_flops() / products < 2.5  # a solve's backward pass has products


def test_operators_of_our_own_are_seen_inside():
    q, k, g = (torch.randn(1, 64, 1, 8).abs() for _ in range(3))
    with counter() as seen, recorded_calls() as calls:
        from subquad.kernels.linear_attention import linear_attention

        linear_attention(q, k, k, -g)
    pairs = 64 * 63 // 2
    assert seen.get_total_flops() == costs.cost(calls[0]).products == 2 * 8 * (pairs + 64 * 64 + 2 * 64 * 8)


def test_projections_and_square_of_attention():
    flops, moved = count(available()["Attention"](64, n_heads=2), "prefill", 3, 100, 64, torch.bfloat16)
    assert flops == 3 * (2 * 100 * 4 * 64 * 64 + 4 * 100 * 100 * 64)
    tokens = 3 * 100 * 64 * 2
    assert moved == 2 * tokens + 4 * 64 * 64 * 2 + 2 * tokens  # input and output, weights, keys and values written


def test_a_decoded_token_reads_weights_and_state():
    layer = available()["Attention"](64, n_heads=2)
    flops, moved = count(layer, "decode", 1, 1000, 64, FLOAT)
    assert flops == 2 * 4 * 64 * 64 + 4 * 1001 * 64
    assert moved == 4 * (2 * 64 + 4 * 64 * 64 + 2 * 1001 * 64)
    shortest, longest = (count(available()["HGRN"](64), "decode", 1, n, 64, FLOAT) for n in (10, 10_000))
    assert shortest == longest


def test_training_moves_gradients_as_well():
    layer = SwiGLU(16, d_ff=24)
    assert count(layer, "train", 2, 8, 16, FLOAT) == (3 * 2 * 16 * 3 * 16 * 24, 2 * 4 * (2 * 16 * 16 + 3 * 16 * 24))


def test_experts_read_by_few_tokens():
    layer = available()["MoE"](16, n_experts=8, top_k=2, d_ff=4)
    router, expert = layer.router.weight.numel() if hasattr(layer.router, "weight") else 16 * 8, 3 * 16 * 4
    rest = sum(p.numel() for p in layer.parameters()) - 8 * expert
    assert rest >= router
    for tokens, read in ((1, 2), (3, 6), (5, 8)):
        assert count(layer, "prefill", 1, tokens, 16, FLOAT)[1] == 4 * (2 * tokens * 16 + rest + read * expert)


def test_whole_models():
    config = {"d_model": 16, "vocab_size": 32, "tie_embeddings": False}
    model = LM.from_config({**config, "blocks": [{"pattern": [{"mixer": {"name": "Attention", "n_heads": 2}}]}]})
    flops, moved = count(model, "decode", 1, 9, 16, FLOAT)
    assert flops == 2 * (4 * 16 * 16 + 16 * 32) + 4 * 10 * 16
    weights = 16 + 4 * 16 * 16 + 2 * 16 + 16 * 32  # a row of the embedding, projections, norms, head
    assert moved == 8 + 4 * (32 + weights + 2 * 10 * 16)


def test_the_op_alone():
    layer = available()["HGRN"](64)
    calls = forward(partial(on_meta(layer, FLOAT), torch.empty(2, 30, 64, device="meta")))[2]
    (call,) = mixing(layer, calls)
    assert [call.op for call in calls] == ["scan", "norm"]
    values = call.args[0].numel()
    assert count_op(layer, "train", 2, 30, 64, FLOAT) == (3 * 2 * values, 2 * 4 * 3 * values)
    assert count_op(layer, "prefill", 2, 30, 64, FLOAT) == (2 * values, 4 * (3 * values + 2 * values // 30))
    around, _ = count_op(available()["Mamba2"](64), "prefill", 1, 128, 64, FLOAT)
    assert 0 < around == count_op(available()["Mamba2"](64, d_conv=8), "prefill", 1, 128, 64, FLOAT)[0]


def test_an_op_of_someone_else_counts_as_it_runs():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(8, 4))

        def forward(self, x, state=None, cu_seqlens=None):
            return x @ self.weight, state

    assert count(Own(), "train", 1, 10, 8, FLOAT)[0] == 3 * 2 * 10 * 8 * 4
    assert count(Own(), "prefill", 1, 10, 8, FLOAT)[0] == 2 * 10 * 8 * 4
    with pytest.raises(UserError, match="cannot decode"):
        count(Own(), "decode", 1, 10, 8, FLOAT)


def test_counting_takes_any_length():
    layer = available()["GatedDeltaNet"](64)
    (short, _), (long, _) = (count(layer, "train", 1, n, 64, FLOAT) for n in (2**14, 2**20))
    assert long == 2**6 * short


def test_packed_rows_have_no_formula():
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    with recorded_calls() as calls:
        scan(torch.rand(1, 10, 2), torch.rand(1, 10, 2), cu_seqlens=cu_seqlens)
    with pytest.raises(UserError, match="packed rows"):
        costs.cost(calls[0])


def test_nothing_runs_and_nothing_is_kept():
    layer = available()["Mamba2"](32)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    y, flops, calls = forward(lambda: on_meta(layer, FLOAT)(torch.empty(1, 10**6, 32, device="meta")))
    assert y.is_meta and y.shape == (1, 10**6, 32) and flops > 0
    assert [call.op for call in calls] == ["short_conv", "linear_attention", "norm"]
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
