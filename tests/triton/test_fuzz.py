"""A thousand random shapes, layouts and gate regimes an op against float64, on a GPU: pytest -m slow tests/triton.

Widths come from a few pairs, since each is another kernel to compile; everything else is drawn. The oracle is the torch
form in float64, which agrees with the recurrence to 1e-10 (tests/kernels) and takes a tenth of its time.
"""

import random

import pytest
import torch
import torch.nn.functional as F

from subquad.kernels.backend import backend
from subquad.kernels.delta_rule import delta_rule
from subquad.kernels.dplr_rule import dplr_rule
from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.norm import norm
from subquad.kernels.running_max import running_max
from subquad.kernels.short_conv import short_conv

pytestmark = [
    pytest.mark.unchecked,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
WIDTHS = ((16, 24), (80, 48))  # `subquad doctor` checks the usual ones
GATES = (0.0, -1e-6, -0.01, -1.0, -20.0, -1e4)
BATCHES, DRAWS = 20, 50


def gate(rng, shape):
    """One regime a call: all alike, mild, or a mixture of extremes."""
    regime = rng.choice(["one", "mild", "mixed"])
    if regime == "one":
        return torch.full(shape, rng.choice(GATES), dtype=torch.float64)
    if regime == "mild":
        return -rng.choice([0.01, 1.0]) * torch.rand(shape, dtype=torch.float64)
    return torch.tensor(GATES, dtype=torch.float64)[torch.randint(0, len(GATES), shape)]


def linear(rng, B, T, H, K, V):
    G = rng.choice([g for g in range(1, H + 1) if H % g == 0])
    q, k, v = (torch.randn(B, T, g, w, dtype=torch.float64) for g, w in ((G, K), (G, K), (H, V)))
    kind = rng.choice(["none", "constant", "scalar", "vector"])
    shapes = {"constant": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}
    options = {"exclusive": rng.random() < 0.4}
    if kind != "vector" and rng.random() < 0.3:
        q, k, options["normalizer"] = q.abs(), k.abs(), 1.0
    g = gate(rng, shapes[kind]) if kind in shapes else None
    return linear_attention, [q, k, v, g], options, (H, K, V)


def delta(rng, B, T, H, K, V):
    R, G = rng.choice([1, 1, 1, 2, 3]), rng.choice([g for g in range(1, H + 1) if H % g == 0])
    factors = (R,) if R > 1 else ()
    k = F.normalize(torch.randn(B, T, *factors, G, K, dtype=torch.float64), dim=-1)
    shapes = {"scalar": (B, T, H), "vector": (B, T, H, K)}
    kind = rng.choice(["none", "scalar", "vector"])
    return delta_rule, [
        torch.randn(B, T, G, K, dtype=torch.float64), k, torch.randn(B, T, *factors, H, V, dtype=torch.float64),
        1.99 * torch.rand(B, T, *factors, H, dtype=torch.float64), gate(rng, shapes[kind]) if kind in shapes else None,
    ], {}, (H, K, V)  # fmt: skip


def dplr(rng, B, T, H, K, V):
    q, k, a = (torch.randn(B, T, H, K, dtype=torch.float64) for _ in range(3))
    a = F.normalize(a, dim=-1)
    kind = rng.choice([None, (B, T, H), (B, T, H, K)])
    v, b = torch.randn(B, T, H, V, dtype=torch.float64), -a * torch.rand(B, T, H, K, dtype=torch.float64)
    return dplr_rule, [q, k, v, a, b, None if kind is None else gate(rng, kind)], {}, (H, K, V)


def conv(rng, B, T, H, K, V):
    W, D = rng.choice([3, 4]), K
    weight, bias = torch.randn(D, W, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    options = {"activation": rng.choice([None, "silu"])}
    x = torch.randn(B, T, D, dtype=torch.float64)
    return short_conv, [x, weight, rng.choice([None, bias])], options, (W - 1, D)


def maximum(rng, B, T, H, K, V):
    return running_max, [gate(rng, (B, T, H)), torch.randn(B, T, H, dtype=torch.float64)], {}, (H,)


def normed(rng, B, T, H, K, V):
    groups = rng.choice([1, 1, 2, K // 8])
    shape = rng.choice([(B, T, K), (B, T, H, K)])
    x, z, residual = torch.randn(3, *shape, dtype=torch.float64)
    weight, bias = torch.randn(2, K, dtype=torch.float64)
    parts = [x, *(rng.choice([None, part]) for part in (weight, bias, z, residual))]
    options = {"centered": rng.random() < 0.5, "n_groups": groups, "activation": rng.choice(["silu", "sigmoid"])}
    options |= {"gate_first": rng.random() < 0.5, "scale": rng.choice([1.0, 0.3]), "eps": rng.choice([1e-5, 0.1])}
    return without_state, parts, options, None


def without_state(x, weight, bias, z, residual, *, state, cu_seqlens, **options):
    return norm(x, weight, bias, z=z, residual=residual, **options)


def results(form, op, inputs, options, state, rows, dtype):
    inputs = [None if x is None else x.to("cuda", dtype).requires_grad_() for x in inputs]
    state = None if state is None else [s.to("cuda", dtype).requires_grad_() for s in state]
    carried = None if state is None else tuple(state) if len(state) > 1 else state[0]
    with backend(form):
        out, new = op(*inputs, **options, state=carried, cu_seqlens=rows)
    found = [out, *(new if isinstance(new, tuple) else [] if new is None else [new])]
    torch.manual_seed(7)
    weights = [torch.randn(x.shape, dtype=torch.float64).to("cuda", x.dtype) for x in found]
    sources = [x for x in (*inputs, *(state or ())) if x is not None]
    return [x.detach() for x in (*found, *torch.autograd.grad(found, sources, weights, materialize_grads=True))]


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("make", [linear, delta, dplr, conv, maximum, normed])
def test_random_calls(make, batch):
    for number in range(DRAWS):
        rng = random.Random(f"{make.__name__} {batch} {number}")
        torch.manual_seed(rng.randrange(2**31))
        B, T, H = rng.choice([1, 2, 3]), rng.choice([1, 2, 5, 17, 63, 64, 65, 100, 150]), rng.choice([2, 4])
        rows = None
        if rng.random() < 0.4:
            bounds = sorted(rng.randint(0, max(1, T - 3)) for _ in range(rng.randint(0, 3)))
            B, rows = 1, torch.tensor([0, *bounds, max(1, T - rng.randint(0, 3))], dtype=torch.int32, device="cuda")
        op, inputs, options, shape = make(rng, B, T, H, *rng.choice(WIDTHS))
        state = None
        if shape is not None and rng.random() < 0.5:
            n_seqs = B if rows is None else rows.numel() - 1
            state = [torch.randn(n_seqs, *shape, dtype=torch.float64)]
            if "normalizer" in options:
                state.append(torch.rand(n_seqs, *shape[:2], dtype=torch.float64))
        case = (make.__name__, batch, number)
        ours = results("triton", op, inputs, options, state, rows, torch.float32)
        oracle = results("torch", op, inputs, options, state, rows, torch.float64)
        least = scales(inputs, oracle) if make in (linear, delta, dplr) else {}
        errors = differences(ours, oracle, least)
        if not all(x <= 1e-5 for x in errors):
            floors = differences(results("naive", op, inputs, options, state, rows, torch.float32), oracle, least)
            assert all(x <= max(2e-5, 3 * f) for x, f in zip(errors, floors, strict=True)), (case, errors, floors)


def scales(inputs, found):
    """A decay's gradient is a difference of sums as large as the output times its gradient, and of a constant decay the
    sum of those of all tokens: where it nearly vanishes, its error is relative to that."""
    if inputs[-1] is None:
        return {}
    given = sum(x is not None for x in inputs)
    first = next(n for n, x in enumerate(found) if n and x.shape == inputs[0].shape)  # after the outputs
    tokens = found[0].shape[1] if inputs[-1].dim() == 1 else 1
    return {first + given - 1: float(found[0].norm()) * tokens}


def differences(found, expected, least):
    pairs = enumerate(zip(found, expected, strict=True))
    return [float((x.double() - y).norm() / y.norm().clamp(min=max(0.1, least.get(n, 0)))) for n, (x, y) in pairs]
