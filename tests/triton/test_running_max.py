"""running_max in Triton: against the naive form, ties, gates at their extremes, blocks, in place, compiled."""

import pytest
import torch

from subquad.errors import UserError
from subquad.kernels.backend import backend
from subquad.kernels.examples import Example, differences, examples, relative_error, run
from subquad.kernels.running_max import running_max
from subquad.kernels.triton import running_max as module

pytestmark = pytest.mark.unchecked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, and several tiles of blocks, out of few tokens: the interpreter is slow."""
    for table, name, value in (
        (module.FORWARD, "rows", 16),
        (module.BACKWARD, "rows", 8),
        (module.CARRY, "TILE", 2),
    ):
        monkeypatch.setitem(table, name, value)


def check(f, i, state=None, cu_seqlens=None, bar=1e-5, **options) -> None:
    case = Example("made here", running_max, {"f": f, "i": i}, options, state, cu_seqlens).to(DEVICE)
    errors = differences(case, "triton")
    assert all(x < bar for x in errors.values()), errors


@pytest.mark.parametrize("time", [1, 2, 7, 20])
def test_examples(time):
    for case in examples("running_max", time=time, dtype=torch.float32, device=DEVICE):
        errors = differences(case, "triton")
        assert all(x < 1e-5 for x in errors.values()), (case.name, errors)


@pytest.mark.parametrize("shape", [(1, 65), (3, 9, 2), (2, 8, 3, 5), (1, 64, 17)])
def test_shapes(shape):
    check(-torch.rand(shape), torch.randn(shape), torch.randn(shape[0], *shape[2:]))
    check(-torch.rand(shape), torch.randn(shape), initial=-2.0)


def test_ties_share_the_gradient_as_torch_does():
    f, i = -torch.randint(0, 2, (2, 40, 3)).float(), torch.randint(-3, 1, (2, 40, 3)).float()
    check(f, i, torch.zeros(2, 3))


def test_gates_that_mix_small_and_huge():
    f = torch.where(torch.rand(1, 60, 4) < 0.1, -1e4, -0.01)
    check(f, 3 * torch.randn(1, 60, 4), torch.randn(1, 4))
    # Nothing is ever taken: the maximum falls all the way.
    check(f, torch.full_like(f, -1e7), torch.randn(1, 4))


def test_packed_rows():
    """Empty sequences, sequences of many blocks and of less than one, and padding that holds NaN."""
    cu_seqlens = torch.tensor([0, 0, 1, 3, 3, 40, 41, 41], dtype=torch.int32)
    f, i = -torch.rand(1, 45, 3), torch.randn(1, 45, 3)
    f[:, 41:], i[:, 41:] = float("nan"), float("nan")
    check(f, i, torch.randn(7, 3), cu_seqlens)
    check(f, i, None, cu_seqlens)


def test_expanded_inputs_and_gradients():
    f = -torch.rand(3, device=DEVICE)
    i = torch.randn(20, 6, 2, device=DEVICE).transpose(0, 2)[:, ::2]

    def outcome(form, upstream):
        f_, i_ = f.clone().requires_grad_(), i.detach().requires_grad_()
        with backend(form):
            m, _ = running_max(f_[None, :, None].expand(2, 3, 20), i_)
        return m.detach(), *torch.autograd.grad(m, (f_, i_), upstream)

    for upstream in (
        torch.ones(1, device=DEVICE).expand(2, 3, 20),
        torch.randn(20, 3, 2, device=DEVICE).permute(2, 1, 0),
    ):
        for ours, reference in zip(outcome("triton", upstream), outcome("naive", upstream), strict=True):
            assert relative_error(ours, reference) < 1e-5


@pytest.mark.parametrize("time", [0, 1, 2, 8, 21])
@pytest.mark.parametrize("packed", [False, True])
def test_without_gradients_the_state_is_written_in_place(time, packed):
    cu_seqlens = torch.tensor([0, 0, time], dtype=torch.int32, device=DEVICE) if packed else None
    f, i = torch.randn(2, 1 if packed else 2, time, 3, device=DEVICE)
    for state in (torch.randn(2, 3, device=DEVICE), torch.randn(2, 6, device=DEVICE)[:, ::2]):
        with torch.no_grad():
            with backend("naive"):
                m, new = running_max(f, i, state=state.clone(), cu_seqlens=cu_seqlens)
            before = state.clone()
            with backend("triton"):
                ours, same = running_max(f, i, state=state, cu_seqlens=cu_seqlens)
        assert same is state
        assert ours.shape == m.shape
        assert relative_error(ours, m) < 1e-5
        assert relative_error(state, new) < 1e-5
        if packed:
            assert torch.equal(state[0], before[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="half precision is wrong under the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    for case in examples("running_max", time=65, device=DEVICE):
        low = case.to(dtype)
        ours, plain, wide = run(low, "triton"), run(low, "torch"), run(low.to(torch.float64), "naive")
        for name in wide:
            unavoidable = relative_error(plain[name], wide[name])
            assert relative_error(ours[name], wide[name]) <= max(1e-5, 2 * unavoidable), name


def test_no_second_derivative():
    i = torch.randn(1, 3, 2, device=DEVICE, requires_grad=True)
    with backend("triton"):
        m, _ = running_max(-i.abs(), i)
    (g,) = torch.autograd.grad(m.square().sum(), i, create_graph=True)
    with pytest.raises(UserError, match="no second derivative"):
        g.sum().backward()


def test_registration():
    f, i, state = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((2, 3, 4), (2, 3, 4), (2, 4)))
    torch.library.opcheck(module._max.op, (f, i, state, None))


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_whole(grad):
    def layer(f, i, state):
        m, state = running_max(f, i, state=state)
        return 2 * m, state

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    f, i = torch.randn(2, 3, 4, device=DEVICE, requires_grad=grad), torch.randn(2, 3, 4, device=DEVICE)
    state = torch.randn(2, 4, device=DEVICE)
    with backend("triton"), torch.set_grad_enabled(grad):
        expected, last = layer(f, i, state.clone())
        m, new = compiled(f, i, state)
    assert torch.equal(m, expected)
    assert torch.equal(new, last)
    if grad:
        ours, reference = (torch.autograd.grad(out.sum(), f)[0] for out in (m, expected))
        assert torch.equal(ours, reference)
    else:
        assert torch.equal(state, last)
