"""short_conv and shift in Triton: against the naive form, at odd sizes, in place, compiled."""

import pytest
import torch
import torch.nn.functional as F

from subquad.errors import UserError
from subquad.kernels.backend import backend
from subquad.kernels.examples import Example, differences, examples, relative_error, run
from subquad.kernels.short_conv import shift, short_conv
from subquad.kernels.triton.short_conv import _conv

pytestmark = pytest.mark.unchecked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [pytest.param(d, marks=pytest.mark.skipif(DEVICE == "cpu", reason="wrong under the interpreter"))
        for d in (torch.bfloat16, torch.float16)]  # fmt: skip


def example(op, inputs, state=None, cu_seqlens=None, **options) -> Example:
    return Example("made here", op, inputs, options, state, cu_seqlens).to(DEVICE)


def check(case: Example, bar: float = 1e-5) -> None:
    errors = differences(case, "triton")
    assert all(x < bar for x in errors.values()), errors


@pytest.mark.parametrize("time", [1, 2, 19])
def test_examples(time):
    for case in examples("short_conv", time=time, dtype=torch.float32, device=DEVICE):
        check(case)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype):
    """The error is at most twice that of plain torch."""
    for case in examples("short_conv", time=65, device=DEVICE):
        low = case.to(dtype)
        ours, plain = run(low, "triton"), run(low, "torch")
        wide = run(low.to(torch.float64), "naive")
        for name in wide:
            unavoidable = relative_error(plain[name], wide[name])
            assert relative_error(ours[name], wide[name]) <= max(1e-5, 2 * unavoidable), name


@pytest.mark.parametrize(("time", "width", "taps"), [(63, 3, 1), (64, 17, 2), (18, 40, 8), (5, 3, 8), (7, 1, 3)])
def test_odd_sizes(time, width, taps):
    x, weight, bias = torch.randn(2, time, width), torch.randn(width, taps), torch.randn(width)
    inputs, state = {"x": x, "weight": weight, "bias": bias}, torch.randn(2, taps - 1, width)
    check(example(short_conv, inputs, state, activation="silu"))


@pytest.mark.parametrize("lengths", [[0, 1, 2, 0, 3, 9, 1, 0], [0, 1, 0]])
def test_packed_rows(lengths):
    """Sequences shorter than the taps, empty ones, and padding that holds NaN."""
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    x, weight = torch.randn(1, sum(lengths) + 5, 6), torch.randn(6, 4)
    state = torch.randn(len(lengths), 3, 6)
    x[:, sum(lengths) :] = float("nan")
    check(example(short_conv, {"x": x, "weight": weight}, state, cu_seqlens, activation="silu"))
    check(example(short_conv, {"x": x, "weight": weight}, None, cu_seqlens))
    check(example(shift, {"x": x}, state[:, :1].contiguous(), cu_seqlens))


@pytest.mark.parametrize("time", [1, 2, 33])
def test_shift(time):
    check(example(shift, {"x": torch.randn(2, time, 5)}, torch.randn(2, 1, 5)))
    check(example(shift, {"x": torch.randn(2, time, 5)}))


def test_long_stretches(monkeypatch):
    """Several groups of rows a program and several programs a sequence."""
    from subquad.kernels.triton import short_conv as module

    monkeypatch.setitem(module.BACKWARD, "stretch", 8)
    monkeypatch.setitem(module.BACKWARD, "programs", 4)
    inputs = {"x": torch.randn(1, 29, 6), "weight": torch.randn(6, 4), "bias": torch.randn(6)}
    check(example(short_conv, inputs, torch.randn(1, 3, 6), activation="silu"))
    cu_seqlens = torch.tensor([0, 17, 27], dtype=torch.int32)
    check(example(short_conv, {**inputs, "x": torch.randn(1, 29, 6)}, torch.randn(2, 3, 6), cu_seqlens))


def test_strided_inputs_and_gradients():
    wide = torch.randn(2, 20, 9, device=DEVICE)
    weight = torch.randn(4, 5, device=DEVICE).t()

    def outcome(form, x, upstream):
        x, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with backend(form):
            y, _ = short_conv(x, w)
        return y, *torch.autograd.grad(y, (x, w), upstream)

    upstreams = (torch.ones(1, device=DEVICE).expand(2, 20, 5), torch.randn(5, 20, 2, device=DEVICE).permute(2, 1, 0))
    for x in (wide[..., 3:8], wide.transpose(0, 1)[:2, :, :5].repeat(1, 10, 1), wide.permute(0, 1, 2)[..., ::2]):
        for upstream in upstreams:
            for ours, reference in zip(outcome("triton", x, upstream), outcome("naive", x, upstream), strict=True):
                assert relative_error(ours.detach(), reference.detach()) < 1e-5


@pytest.mark.parametrize("time", [1, 2, 8, 21])
@pytest.mark.parametrize("packed", [False, True])
def test_without_gradients_the_state_is_written_in_place(time, packed):
    cu_seqlens = torch.tensor([0, 0, time], dtype=torch.int32, device=DEVICE) if packed else None
    x, weight = torch.randn(1 if packed else 2, time, 6, device=DEVICE), torch.randn(6, 5, device=DEVICE)
    for state in (torch.randn(2, 4, 6, device=DEVICE), torch.randn(2, 4, 12, device=DEVICE)[..., ::2]):
        before = state.clone()
        with torch.no_grad():
            with backend("naive"):
                y, new = short_conv(x, weight, state=state.clone(), cu_seqlens=cu_seqlens)
            with backend("triton"):
                ours, same = short_conv(x, weight, state=state, cu_seqlens=cu_seqlens)
        assert same is state
        assert relative_error(ours, y) < 1e-5
        assert torch.equal(state, new)
        if packed:
            assert torch.equal(state[0], before[0])


def test_no_tokens():
    x, weight = torch.randn(2, 0, 6, device=DEVICE), torch.randn(6, 4, device=DEVICE, requires_grad=True)
    state = torch.randn(2, 3, 6, device=DEVICE, requires_grad=True)
    with backend("triton"):
        y, new = short_conv(x, weight, state=state)
        assert y.shape == x.shape
        assert torch.equal(new, state)
        assert torch.equal(torch.autograd.grad(new.sum(), state)[0], torch.ones_like(state))
        with torch.no_grad():
            assert short_conv(x, weight, state=state)[1] is state


def test_no_second_derivative():
    x, weight = (torch.randn(1, 3, 4, device=DEVICE, requires_grad=True), torch.randn(4, 4, device=DEVICE))
    with backend("triton"):
        y, _ = short_conv(x, weight)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="no second derivative"):
        g.sum().backward()


def test_gradients_repeat():
    case = examples("short_conv", time=17, dtype=torch.float32, device=DEVICE)[-1]
    first, second = run(case, "triton"), run(case, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_registration():
    x, weight = torch.randn(2, 3, 4, device=DEVICE, requires_grad=True), torch.randn(4, 3, device=DEVICE)
    state = torch.randn(2, 2, 4, device=DEVICE, requires_grad=True)
    torch.library.opcheck(_conv.op, (x, weight.requires_grad_(), None, state, None, True))
    torch.library.opcheck(_conv.op, (x, None, None, None, None, False))


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_whole(grad):
    def layer(x, weight, state):
        y, state = short_conv(x, weight, activation="silu", state=state)
        return shift(y)[0] * 2, state

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, weight = torch.randn(2, 3, 4, device=DEVICE), torch.randn(4, 3, device=DEVICE, requires_grad=grad)
    state = torch.randn(2, 2, 4, device=DEVICE)
    with backend("triton"), torch.set_grad_enabled(grad):
        expected, last = layer(x, weight, state.clone())
        y, new = compiled(x, weight, state)
    assert torch.equal(y, expected)
    assert torch.equal(new, last)
    if grad:
        ours, reference = (torch.autograd.grad(out.sum(), weight)[0] for out in (y, expected))
        assert torch.equal(ours, reference)
    else:
        assert torch.equal(state, last)


def test_wrong_widths():
    with pytest.raises(UserError, match=r"weight is \[5, W\]"):
        short_conv(torch.randn(1, 3, 5), torch.randn(4, 3))
