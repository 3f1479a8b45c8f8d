"""The Triton forms of linear_attention, delta_rule and dplr_rule against their definitions, as users call them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from subquad.errors import UserError
from subquad.kernels.backend import backend
from subquad.kernels.delta_rule import delta_rule
from subquad.kernels.dplr_rule import dplr_rule
from subquad.kernels.examples import differences, examples
from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.triton import segments, wide

pytestmark = pytest.mark.unchecked
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
OPS = {"linear_attention": linear_attention, "delta_rule": delta_rule, "dplr_rule": dplr_rule}
NAMES = {
    (op, e.name.split(", ")[0] if "bonus" not in e.name else "exclusive") for op in OPS for e in examples(op, time=2)
}
GATES = (0.0, -1e-6, -0.01, -20.0, -1e4)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def inputs_of(op, T, *, B=1, G=1, H=2, K=16, V=24, gate=None, extreme=False):
    """Random float64 inputs by position; gate: None, "scalar" or "vector"."""
    keys = H if op == "dplr_rule" else G
    q, k, v = draw(B, T, keys, K), F.normalize(draw(B, T, keys, K), dim=-1), draw(B, T, H, V)
    shape = {"scalar": (B, T, H), "vector": (B, T, H, K)}.get(gate)
    g = None
    if shape:
        g = torch.tensor(GATES).double()[torch.randint(0, 5, shape)] if extreme else -torch.rand(shape).double()
    if op == "linear_attention":
        return [q, k, v, g]
    if op == "delta_rule":
        return [q, k, v, 1.99 * torch.rand(B, T, H).double(), g]
    a = F.normalize(draw(B, T, H, K), dim=-1)
    return [q, k, v, a, -a * torch.rand(B, T, H, 1).double(), g]


def results(form, op, inputs, dtype, *, state=None, upstream=None, **options):
    """Output, new state and every gradient, under random weights from above or `upstream`."""
    inputs = [None if x is None else x.detach().to(DEVICE, dtype).requires_grad_() for x in inputs]
    state = None if state is None else state.to(DEVICE, torch.promote_types(dtype, torch.float32)).requires_grad_()
    with backend(form):
        out, new = OPS[op](*inputs, state=state, **options)
    found = [x for x in (out, new) if x is not None]
    torch.manual_seed(1)
    weights = [torch.randn(x.shape, dtype=torch.float64).to(DEVICE) for x in found] if upstream is None else upstream
    sources = [x for x in (*inputs, state) if x is not None]
    gradients = torch.autograd.grad(found, sources, [w.to(x.dtype) for w, x in zip(weights, found, strict=True)])
    return [x.detach() for x in (*found, *gradients)]


def agree(op, inputs, *, tolerance=1e-5, dtype=torch.float32, **options):
    ours = results("triton", op, inputs, dtype, **options)
    reference = results("naive", op, inputs, torch.float64, **options)
    unavoidable = results("naive", op, inputs, torch.float32, **options)
    for number, (x, y, z) in enumerate(zip(ours, reference, unavoidable, strict=True)):
        error, floor = (float((t.double() - y).norm() / y.norm().clamp(min=1e-6)) for t in (x, z))
        assert error <= max(tolerance, 3 * floor), (op, number, error, floor)


@pytest.mark.parametrize(("op", "name"), sorted(NAMES))
def test_every_option_in_a_packed_row_with_a_state(op, name):
    (example,) = (
        e
        for e in examples(op, time=40, dtype=torch.float32, device=DEVICE)
        if e.name.startswith(f"{name}, ") and e.name.endswith("packed, carried")
    )
    errors = differences(example, "triton")
    assert all(x < 1e-5 for x in errors.values()), errors


@pytest.mark.parametrize("T", [1, 2, 7, 63, 65])
@pytest.mark.parametrize(
    ("op", "gate"), [("linear_attention", "scalar"), ("delta_rule", "vector"), ("dplr_rule", None)]
)
def test_any_length(op, gate, T):
    agree(op, inputs_of(op, T, B=2, G=2, gate=gate), state=draw(2, 2, 16, 24))


@pytest.mark.parametrize("op", OPS)
def test_no_tokens_leave_the_state(op):
    inputs = [None if x is None else x.to(DEVICE).float().requires_grad_() for x in inputs_of(op, 0, gate="scalar")]
    state = draw(1, 2, 16, 24).to(DEVICE).float()
    with backend("triton"):
        out, new = OPS[op](*inputs, state=state)
    assert out.shape == (1, 0, 2, 24)
    assert torch.equal(new, state)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("op", OPS)
def test_gates_at_their_extremes(op, gate):
    agree(op, inputs_of(op, 100, gate=gate, extreme=True), state=draw(1, 2, 16, 24))


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("op", OPS)
def test_the_future_changes_nothing(op, gate):
    """Not a bit of any earlier output, whatever a later token and its decay become."""
    inputs = [None if x is None else x.to(DEVICE).float() for x in inputs_of(op, 70, gate=gate)]
    inputs[-1] *= 0.1
    other = [None if x is None else x.clone() for x in inputs]
    for x in other:
        x[:, 30:].copy_(x[:, 30:].flip(1))
    other[-1][:, 30] = -1e4
    with torch.no_grad(), backend("triton"):
        out, changed = (OPS[op](*x)[0] for x in (inputs, other))
    assert torch.equal(out[:, :30], changed[:, :30])
    assert not torch.equal(out[:, 30:], changed[:, 30:])


@pytest.mark.parametrize("op", OPS)
def test_segments_side_by_side_are_one_sequence(op, monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST", 64)
    monkeypatch.setattr(segments, "PROGRAMS", 64)
    agree(op, inputs_of(op, 150, gate="scalar"), state=draw(1, 2, 16, 24))
    rows = torch.tensor([0, 70, 70, 140], dtype=torch.int32, device=DEVICE)
    agree(op, inputs_of(op, 150, gate="scalar"), state=draw(3, 2, 16, 24), cu_seqlens=rows)


def test_segments_with_a_normaliser(monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST", 64)
    monkeypatch.setattr(segments, "PROGRAMS", 64)
    q, k, v, g = inputs_of("linear_attention", 150, gate="scalar")
    found = {}
    for form, dtype in (("triton", torch.float32), ("naive", torch.float64)):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (q.abs(), k.abs(), v, g)]
        with backend(form):
            out, _ = linear_attention(*leaves, normalizer=1.0)
        found[form] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    for ours, reference in zip(found["triton"], found["naive"], strict=True):
        assert (ours.double() - reference).norm() < 1e-5 * reference.norm()


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_and_expanded_gradients(op):
    wide = [None if x is None else torch.cat([x, x], 2) for x in inputs_of(op, 20, G=2, gate="scalar")]
    every_other = [None if x is None else x[:, :, ::2] for x in wide]
    one = torch.ones((), dtype=torch.float64, device=DEVICE)  # as .sum() sends it
    agree(op, every_other, state=draw(1, 2, 16, 24), upstream=[one.expand(1, 20, 2, 24), one.expand(1, 2, 16, 24)])


@pytest.mark.parametrize("T", [1, 8, 70])
@pytest.mark.parametrize("op", OPS)
def test_without_gradients_the_state_is_written_in_place(op, T):
    inputs = [None if x is None else x.to(DEVICE) for x in inputs_of(op, T, B=2, gate="vector")]
    state = draw(2, 2, 16, 24).to(DEVICE)
    ours = state.float()
    with torch.no_grad(), backend("triton"):
        out, new = OPS[op](*(None if x is None else x.float() for x in inputs), state=ours)
    with torch.no_grad(), backend("naive"):
        reference, last = OPS[op](*inputs, state=state)
    assert new is ours
    assert (out - reference).norm() < 1e-5 * reference.norm()
    assert (new - last).norm() < 1e-5 * last.norm()


@pytest.mark.parametrize("op", OPS)
def test_no_second_derivative(op):
    inputs = [None if x is None else x.to(DEVICE).float().requires_grad_() for x in inputs_of(op, 4)]
    with backend("triton"):
        out, _ = OPS[op](*inputs)
    (first,) = torch.autograd.grad(out.sum(), inputs[2], create_graph=True)
    with pytest.raises(UserError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("gate", [None, "scalar", "vector"])
@pytest.mark.parametrize("op", OPS)
def test_compiled_whole(op, gate):
    torch._dynamo.reset()
    inputs = [None if x is None else x.to(DEVICE).float().requires_grad_() for x in inputs_of(op, 10, gate=gate)]
    state = draw(1, 2, 16, 24).to(DEVICE).float()

    def call(*inputs):
        out, new = OPS[op](*inputs, state=state)
        return out.sum() + new.square().sum()

    leaves = [x for x in inputs if x is not None]
    with backend("triton"):
        expected = torch.autograd.grad(call(*inputs), leaves)
        found = torch.autograd.grad(torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs), leaves)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_checkpointing_and_autocast():
    leaves = [x.to(DEVICE).float().requires_grad_() for x in inputs_of("linear_attention", 10, gate="scalar")]
    with backend("triton"):
        expected = torch.autograd.grad(linear_attention(*leaves)[0].sum(), leaves)
        with torch.autocast(DEVICE, torch.bfloat16):
            out = checkpoint(lambda *x: linear_attention(*x)[0].sum(), *leaves, use_reentrant=False)
        found = torch.autograd.grad(out, leaves)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_what_it_does_not_take_is_said():
    q, k, v, beta = (
        x.to(DEVICE) for x in (*torch.randn(2, 1, 3, 1, 300), torch.randn(1, 3, 1, 8), torch.rand(1, 3, 1))
    )
    with backend("triton"), pytest.raises(UserError, match="keys of width 300, above 256"):
        delta_rule(q, k, v, beta)
    with backend("triton"), pytest.raises(UserError, match="float64"):
        linear_attention(q.double(), k.double(), v.double())


@gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("op", OPS)
def test_half_precision(op, dtype, tolerance):
    inputs = [None if x is None else x.to(dtype).double() for x in inputs_of(op, 200, G=2, K=64, V=64, gate="vector")]
    agree(op, inputs, dtype=dtype, tolerance=tolerance, state=draw(1, 2, 64, 64))


LAYOUTS = ((77, 3, None), (1, 1, None), (64, 2, None), (7001, 1, None), (300, 1, [0, 10, 10, 200]))


@gpu
@pytest.mark.parametrize("op", OPS)
def test_another_length_batch_or_layout_compiles_nothing(op):
    from triton import knobs

    compiled = []
    knobs.runtime.jit_post_compile_hook = lambda *, key, repr, **rest: compiled.append(repr)
    try:
        for gate in (None, "scalar", "vector"):
            # A long sequence on its own is cut into segments and a packed row may be padded: a few kernels more.
            for T, B, rows in ((130, 1, None), (5000, 1, None), (200, 1, [0, 190]), *LAYOUTS):
                if (T, B, rows) == LAYOUTS[0]:
                    first = len(compiled)
                packed = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=DEVICE)
                results("triton", op, inputs_of(op, T, B=B, gate=gate), torch.bfloat16, cu_seqlens=packed)
            assert compiled[first:] == [], (gate, compiled[first:])
    finally:
        knobs.runtime.jit_post_compile_hook = None


@gpu
def test_past_2_to_the_31_elements():
    T, H, D = 2**17 + 100, 128, 128  # 2.1e9 elements
    q, k, v = (torch.zeros(1, T, H, D, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))
    tail = [x[:, -100:].normal_() for x in (q, k, v)]
    with torch.no_grad():
        out, _ = linear_attention(q, k, v)
        short, _ = linear_attention(*tail)
    assert (out[:, -100:] - short).float().norm() < 1e-2 * short.float().norm()


# Heads wider than the kernels' tiles, which the forms split.

CU_SEQLENS = (0, 9, 9, 27)


@pytest.fixture
def narrow(monkeypatch):
    """Tiles of 16 columns, so that small heads count as wide."""
    monkeypatch.setattr(wide, "WIDEST", 16)


@pytest.mark.parametrize(
    ("width", "parts"), [(1, 1), (256, 1), (257, 3), (273, 3), (320, 3), (500, 2), (512, 2), (1024, 4), (2048, 8)]
)
def test_parts_fill_their_tiles(width, parts):
    assert wide.n_parts(width) == parts


@pytest.mark.parametrize(
    ("op", "gate", "K", "V", "packed"),
    [
        ("linear_attention", "scalar", 20, 23, True),
        ("linear_attention", "vector", 21, 24, False),
        ("delta_rule", "scalar", 16, 37, True),
        ("dplr_rule", "vector", 16, 33, False),
    ],
)
def test_wide_heads_give_outputs_states_and_gradients(narrow, op, gate, K, V, packed):
    T = CU_SEQLENS[-1] if packed else 20
    inputs = inputs_of(op, T, G=2, H=4, K=K, V=V, gate=gate)
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=DEVICE) if packed else None
    agree(op, inputs, state=draw(len(CU_SEQLENS) - 1 if packed else 1, 4, K, V), cu_seqlens=cu_seqlens)


def test_wide_heads_with_a_normaliser(narrow):
    q, k, v, g = inputs_of("linear_attention", 20, G=2, H=4, K=24, V=24, gate="scalar")
    q, k, S, z = F.softplus(q), F.softplus(k), draw(1, 4, 24, 24), F.softplus(draw(1, 4, 24))
    found = []
    for form, dtype in (("triton", torch.float32), ("naive", torch.float64)):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v, g, S, z)]
        with backend(form):
            o, (S_last, z_last) = linear_attention(*leaves[:4], normalizer=1e-3, state=tuple(leaves[4:]))
        gradients = torch.autograd.grad(o.square().sum() + S_last.sum() + z_last.sum(), leaves)
        found.append([x.detach() for x in (o, S_last, z_last, *gradients)])
    for ours, reference in zip(*found, strict=True):
        assert float((ours.double() - reference).norm() / reference.norm()) < 1e-5


def test_the_bonus_of_wide_keys_is_counted_once(narrow):
    q, k, v, g = (x.to(DEVICE) for x in inputs_of("linear_attention", 10, K=40, V=16, gate="vector"))
    bonus = draw(2, 40).to(DEVICE)
    with backend("naive"):
        reference, _ = linear_attention(q, k, v, g, exclusive=True, bonus=bonus)
    with backend("triton"):
        ours, _ = linear_attention(*(x.float() for x in (q, k, v, g)), exclusive=True, bonus=bonus.float())
    assert float((ours - reference).norm() / reference.norm()) < 1e-5


@pytest.mark.parametrize("T", [1, 12])
@pytest.mark.parametrize("op", OPS)
def test_wide_states_are_written_in_place(narrow, op, T):
    inputs = [None if x is None else x.to(DEVICE) for x in inputs_of(op, T, G=2, V=40, gate="scalar")]
    S = draw(1, 2, 16, 40).to(DEVICE)
    with backend("naive"):
        _, reference = OPS[op](*inputs, state=S.clone())
    single = S.float()
    with torch.no_grad(), backend("triton"):
        _, new = OPS[op](*(None if x is None else x.float() for x in inputs), state=single)
    assert new is single
    assert float((new - reference).norm() / reference.norm()) < 1e-5


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "V"), [(256, 512), (128, 320), (256, 257), (273, 112), (273, 512)])
@pytest.mark.parametrize("op", OPS)
def test_published_widths_run_in_the_kernels(op, K, V, dtype):
    if op != "linear_attention" and K > 256:
        pytest.skip("a delta rule's transition mixes all of a key")
    inputs = inputs_of(op, 300, B=2, G=2, H=2, K=K, V=V, gate="scalar" if op == "linear_attention" else "vector")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(op, inputs, tolerance=1e-5 if dtype == torch.float32 else 2e-2, dtype=dtype, state=draw(2, 2, K, V))
