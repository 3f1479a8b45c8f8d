"""norm in Triton: against the naive form, at odd sizes and layouts, in half precision, compiled."""

import pytest
import torch

from subquad.errors import UserError
from subquad.kernels.backend import backend
from subquad.kernels.examples import Example, differences, examples, relative_error, run
from subquad.kernels.norm import norm
from subquad.kernels.triton import norm as module

pytestmark = pytest.mark.unchecked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [pytest.param(d, marks=pytest.mark.skipif(DEVICE == "cpu", reason="wrong under the interpreter"))
        for d in (torch.bfloat16, torch.float16)]  # fmt: skip


def check(inputs, bar: float = 1e-5, **options) -> None:
    case = Example("made here", norm, inputs, options, None, None).to(DEVICE)
    errors = differences(case, "triton")
    assert all(x < bar for x in errors.values()), errors


@pytest.mark.parametrize("time", [1, 2, 19])
def test_examples(time):
    for case in examples("norm", time=time, dtype=torch.float32, device=DEVICE):
        errors = differences(case, "triton")
        assert all(x < 1e-5 for x in errors.values()), (case.name, errors)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype):
    """The error is at most twice that of plain torch."""
    for case in examples("norm", time=65, device=DEVICE):
        low = case.to(dtype)
        ours, plain, wide = run(low, "triton"), run(low, "torch"), run(low.to(torch.float64), "naive")
        for name in wide:
            unavoidable = relative_error(plain[name], wide[name])
            assert relative_error(ours[name], wide[name]) <= max(1e-5, 2 * unavoidable), (case.name, name)


@pytest.mark.parametrize(("count", "width"), [(1, 1), (3, 16), (130, 7), (5, 257), (2, 3000)])
@pytest.mark.parametrize("centered", [False, True])
def test_odd_sizes(count, width, centered):
    x, z, residual = torch.randn(3, count, width)
    inputs = {"x": x, "z": z, "residual": residual, "weight": torch.randn(width), "bias": torch.randn(width)}
    check(inputs, centered=centered, eps=0.1)


def test_several_stretches_of_rows(monkeypatch):
    """A program of the backward pass walks over several tiles, and there are several programs."""
    monkeypatch.setattr(module, "VALUES", 64)
    monkeypatch.setattr(module, "PROGRAMS", 4)
    for n_groups in (1, 2):
        inputs = {"x": torch.randn(39, 32), "weight": torch.randn(32), "bias": torch.randn(32)}
        check({**inputs, "z": torch.randn(39, 32)}, n_groups=n_groups)


def test_large_and_zero_rows():
    x = torch.stack([torch.zeros(40), 1e4 * torch.randn(40), 1e-4 * torch.randn(40)])
    check({"x": x, "weight": torch.randn(40)})
    check({"x": x, "z": 30 * torch.randn(3, 40)}, activation="sigmoid")


def test_mixed_precision():
    """Under autocast a float32 stream takes in what a layer made in half precision; gradients keep their dtypes."""
    narrow = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the interpreter has no bfloat16
    x, residual = torch.randn(4, 32, device=DEVICE, dtype=narrow), torch.randn(4, 32, device=DEVICE)
    z, x, residual = (t.requires_grad_() for t in (torch.randn(4, 32, device=DEVICE), x, residual))
    with backend("triton"):
        y, total = norm(x, residual=residual, z=z)
    assert y.dtype == total.dtype == torch.float32
    gradients = torch.autograd.grad((y * total).sum(), (x, residual, z))
    assert [g.dtype for g in gradients] == [narrow, torch.float32, torch.float32]
    with backend("naive"):
        again, summed = norm(x, residual=residual, z=z)
    expected = torch.autograd.grad((again * summed).sum(), (x, residual, z))
    assert relative_error(y.detach(), again.detach()) < 1e-5
    for ours, reference, bar in zip(gradients, expected, (1e-2, 1e-5, 1e-5), strict=True):
        assert relative_error(ours, reference) < bar


def test_the_sum_alone_can_be_what_matters():
    """No gradient comes to y."""
    x, residual = (torch.randn(3, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    with backend("triton"):
        _, total = norm(x, residual=residual)
    for g in torch.autograd.grad(total.sum(), (x, residual)):
        assert torch.equal(g, torch.ones_like(g))


def test_strided_inputs_and_gradients():
    wide = torch.randn(2, 5, 3, 40, device=DEVICE)
    weight = torch.randn(32, device=DEVICE)[::2]

    def outcome(form, x, z, upstream):
        x, z, w = (t.detach().requires_grad_() for t in (x, z, weight))
        with backend(form):
            y, _ = norm(x, w, z=z)
        return y, *torch.autograd.grad(y, (x, z, w), upstream)

    heads = torch.randn(2, 5, 3, 16, device=DEVICE)
    upstreams = (
        torch.ones(1, device=DEVICE).expand(2, 5, 3, 16),
        torch.randn(16, 3, 5, 2, device=DEVICE).permute(3, 2, 1, 0),
    )
    views = (
        wide[..., :16],
        wide.flatten(2)[..., 7:55].unflatten(-1, (3, 16)),
        wide[..., ::2][..., :16],
        heads.mT.contiguous().mT,
    )
    for x in views:
        for z in (heads, views[1]):
            for upstream in upstreams:
                ours, reference = (outcome(form, x, z, upstream) for form in ("triton", "naive"))
                for a, b in zip(ours, reference, strict=True):
                    assert relative_error(a.detach(), b.detach()) < 1e-5


def test_heads_of_a_split_row_are_read_where_they_stand(monkeypatch):
    """q, k and v out of one projection: the heads have strides, and nothing is copied."""
    row = torch.randn(2, 5, 3 * 64, device=DEVICE)
    q = row.split(64, -1)[1].unflatten(-1, (4, 16))
    found, M, G, N = module._in_rows((q, None), 1)
    assert (M, G, N) == (10, 4, 16)
    assert found == [(q, 192, 16), (None, 0, 0)]
    assert found[0][0].data_ptr() == q.data_ptr()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_nothing(shape):
    x, weight = torch.randn(shape, device=DEVICE, requires_grad=True), torch.randn(shape[-1], device=DEVICE)
    with backend("triton"):
        y, total = norm(x, weight.requires_grad_(), residual=x)
    assert y.shape == total.shape == x.shape
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_no_second_derivative():
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    with backend("triton"):
        y, _ = norm(x)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="no second derivative"):
        g.sum().backward()


def test_gradients_repeat():
    case = examples("norm", time=300, dtype=torch.float32, device=DEVICE)[-1]
    first, second = run(case, "triton"), run(case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_registration():
    x, z, residual = (torch.randn(2, 3, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    weight = torch.randn(8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(module._norm.op, (x, weight, weight, z, residual, True, 2, True, False, 1.0, 1e-5))
    torch.library.opcheck(module._norm.op, (x, None, None, None, None, False, 1, True, False, 1.0, 1e-5))


def test_compiles_whole():
    def layer(x, weight, z):
        y, total = norm(x, weight, z=z, residual=2 * x)
        return y * 2 + total

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, weight, z = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((2, 3, 8), (8,), (2, 3, 8)))
    with backend("triton"):
        expected, y = layer(x, weight, z), compiled(x, weight, z)
    assert torch.equal(y, expected)
    for ours, reference in zip(*(torch.autograd.grad(out.sum(), (x, weight, z)) for out in (y, expected)), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_past_two_to_the_31_elements():
    x = torch.randn(2**20 + 8, 2048, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    with backend("triton"):
        y, _ = norm(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones(1, device=DEVICE, dtype=y.dtype).expand(x.shape))
    rows = x.detach()[-8:].requires_grad_()
    with backend("naive"):
        last, _ = norm(rows)
    (expected,) = torch.autograd.grad(last, rows, torch.ones_like(last))
    assert relative_error(y.detach()[-8:], last.detach()) < 1e-2
    assert relative_error(dx[-8:], expected) < 2e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_groups": 3}, "n_groups 3 does not divide the width 8"),
        ({"activation": "relu"}, "'silu' or 'sigmoid', not 'relu'"),
        ({"weight": torch.ones(4)}, r"weight is \(8,\) for x \(2, 8\); got \(4,\)"),
        ({"z": torch.ones(8)}, r"z is \(2, 8\)"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(UserError, match=message):
        norm(torch.ones(2, 8), **options)
