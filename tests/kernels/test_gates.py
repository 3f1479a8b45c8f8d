"""Gates at their extremes, alone and mixed within a chunk: no overflow, no inf - inf, no loss of small decays."""

import pytest
import torch
import torch.nn.functional as F

from subquad.errors import UserError
from subquad.kernels.backend import backend
from subquad.kernels.delta_rule import delta_rule
from subquad.kernels.dplr_rule import dplr_rule
from subquad.kernels.examples import relative_error
from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.scan import scan
from subquad.kernels.selective_scan import selective_scan

B, T, H, K, V = 2, 130, 3, 6, 5
LEVELS = {
    "zero": [0.0],
    "slight": [-1e-6],
    "strong": [-20.0],
    "stop": [-1e4],
    "mixed": [0.0, -1e-6, -0.01, -1.0, -20.0, -1e4],
}


def gates(levels, *shape):
    return torch.tensor(LEVELS[levels], dtype=torch.float64)[torch.randint(len(LEVELS[levels]), shape)]


def run(form, call, inputs, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    with backend(form):
        out, state = call(*inputs)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in (out, state)]
    return [out, state, *torch.autograd.grad([out, state], inputs, weights)]


def assert_agree(call, inputs):
    """float64 exactly; float32 within the bar of max(1e-5, three times the naive form's own error)."""
    exact = run("naive", call, inputs, torch.float64)
    for got, want in zip(run("torch", call, inputs, torch.float64), exact, strict=True):
        assert relative_error(got, want) < 1e-10
    # In float32 the inputs themselves are rounded first, so that only the arithmetic differs.
    inputs = [x.float() for x in inputs]
    exact = run("naive", call, [x.double() for x in inputs], torch.float64)
    plain = run("naive", call, inputs, torch.float32)
    for got, naive, want in zip(run("torch", call, inputs, torch.float32), plain, exact, strict=True):
        assert relative_error(got, want) <= max(1e-5, 3 * relative_error(naive, want))


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", [(H,), (H, K), (B, T, H), (B, T, H, K)], ids=["constant", "vector", "scalar", "full"])
@pytest.mark.parametrize("exclusive", [False, True])
def test_linear_attention(levels, shape, exclusive):
    inputs = [normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), gates(levels, *shape), normal(B, H, K, V)]
    assert_agree(lambda q, k, v, g, S: linear_attention(q, k, v, g, exclusive=exclusive, state=S), inputs)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", [(B, T, H), (B, T, H, K)], ids=["scalar", "full"])
def test_delta_rule_with_strong_writes(levels, shape):
    """beta reaches 1.99, where the transition reflects the state along the key."""
    k = F.normalize(normal(B, T, H, K), dim=-1)
    beta = 1.99 * torch.rand(B, T, H, dtype=torch.float64)
    inputs = [normal(B, T, H, K), k, normal(B, T, H, V), beta, gates(levels, *shape), normal(B, H, K, V)]
    assert_agree(lambda q, k, v, b, g, S: delta_rule(q, k, v, b, g, state=S), inputs)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", [(B, T, H), (B, T, H, K)], ids=["scalar", "full"])
def test_dplr_rule(levels, shape):
    a = F.normalize(normal(B, T, H, K), dim=-1)
    b = -a * torch.rand(B, T, H, K, dtype=torch.float64)
    inputs = [normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), a, b, gates(levels, *shape)]
    assert_agree(lambda q, k, v, a, b, g, S: dplr_rule(q, k, v, a, b, g, state=S), [*inputs, normal(B, H, K, V)])


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("width", [5, 5000], ids=["rows", "steps"])
def test_scan(levels, width):
    time = 70 if width > 1000 else T
    inputs = [gates(levels, 1, time, width).exp(), normal(1, time, width), normal(1, width)]
    assert_agree(lambda a, b, h: scan(a, b, state=h), inputs)


@pytest.mark.parametrize("levels", LEVELS)
def test_selective_scan(levels):
    dt = -gates(levels, B, T, V)
    inputs = [normal(B, T, V), dt, -normal(V, K).abs(), normal(B, T, K), normal(B, T, K), normal(B, V, K)]
    assert_agree(lambda x, dt, A, b, c, h: selective_scan(x, dt, A, b, c, state=h), inputs)


def test_complex_scan():
    a = torch.polar(torch.rand(1, T, 4, dtype=torch.float64), normal(1, T, 4)).requires_grad_()
    b = torch.complex(normal(1, T, 4), normal(1, T, 4)).requires_grad_()
    h = torch.complex(normal(1, 4), normal(1, 4)).requires_grad_()
    results = []
    for form in ("naive", "torch"):
        with backend(form):
            out, last = scan(a, b, state=h)
        results.append([out, last, *torch.autograd.grad((out.abs().sum() + last.real.sum()), (a, b, h))])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("op", ["scan", "selective_scan"])
def test_second_derivatives_are_refused(op):
    x = torch.rand(1, 9, 4, requires_grad=True)
    if op == "scan":
        out, _ = scan(x, x)
    else:
        out, _ = selective_scan(x, x, -torch.ones(4, 2), x[..., :2], x[..., :2])
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="no second derivative"):
        gradient.sum().backward()
