"""The contract as a suite that any layer passes or fails, property by property.

    subquad conformance my_package.my_module.MyMixer

In a test:

    @pytest.mark.parametrize("prop", conformance.PROPERTIES)
    def test_my_mixer(prop):
        conformance.PROPERTIES[prop](conformance.Subject(MyMixer))

Each property is a function that raises AssertionError with one sentence, or NotApplicableError. The oracle is the
`naive` form of the ops in float64; errors are ||a - b|| / ||b||, and NaN fails.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.backend import backend
from subquad.kernels.packing import cu_seqlens_of
from subquad.kernels.state import accumulator_dtype, leaves, map_leaves

EXACT = 1e-9  # float64 against float64, whatever the order of summation
LENGTHS = (1, 2, 7, 63, 64, 65, 1000)
Named = dict[str, Tensor]
Property = Callable[["Subject"], None]
_SINGLE = {torch.float64: torch.float32, torch.complex128: torch.complex64}
_DOUBLE = {narrow: wide for wide, narrow in _SINGLE.items()}


class Subject:
    """A layer under test: how to make it, and what it declares about itself."""

    def __init__(
        self, make: Callable[..., nn.Module], d_model: int | None = None, arguments: Mapping[str, Any] | None = None
    ):
        self.make, self.arguments = make, dict(arguments or {})
        self.d_model = d_model or max(48, getattr(make, "min_width", 1))
        self.layer = self.build()
        self.decodes = hasattr(self.layer, "init_state")
        self.max_len: int = getattr(self.layer, "max_len", None) or 10**9
        self.causal: bool = getattr(self.layer, "causal", True)
        self.discrete: bool = getattr(self.layer, "discrete", False)

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A fresh layer whose parameters are all away from special values such as zero."""
        torch.manual_seed(1)
        layer = self.make(self.d_model, **self.arguments)
        for p in layer.parameters():
            with torch.no_grad():
                p.add_(0.05 * torch.randn_like(p))
        return layer.to(dtype)

    def inputs(self, batch: int, time: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(batch, time, self.d_model, dtype=torch.float64).to(dtype)

    def state(self, layer: nn.Module, batch: int, room: int, warm: int = 5) -> Any:
        """A state that has seen `warm` random tokens, with room for more."""
        dtype = next(layer.parameters()).dtype
        with torch.no_grad():
            return layer(self.inputs(batch, warm, dtype), layer.init_state(batch, room + warm))[1]


@dataclass
class Result:
    name: str
    passed: bool
    message: str
    applies: bool = True


def check(layer: Callable[..., nn.Module], d_model: int | None = None, **arguments: Any) -> list[Result]:
    """Every property of a layer, given as a class or a function of d_model."""
    subject = Subject(layer, d_model, arguments)
    return [attempt(name, subject) for name in PROPERTIES]


def attempt(name: str, subject: Subject) -> Result:
    """Try one property; a layer that raises fails it."""
    try:
        PROPERTIES[name](subject)
    except NotApplicableError as reason:
        return Result(name, True, str(reason), applies=False)
    except AssertionError as error:
        return Result(name, False, str(error))
    except Exception as error:
        return Result(name, False, f"{type(error).__name__}: {error}")
    return Result(name, True, "")


# Measuring


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; infinite for NaN or another shape.

    It is absolute where ||want|| is below 1e-6, which is a zero that was rounded (a stabiliser's gradient, for one).
    """
    if got.shape != want.shape:
        return float("inf")
    wide = torch.promote_types(want.dtype, torch.float64)
    got, want = got.detach().to(wide), want.detach().to(wide)
    difference, size = (got - want).norm().item(), want.norm().item()
    relative = difference / size if size > 1e-6 else difference
    return relative if relative == relative else float("inf")


def assert_close(got: Named, want: Named, bound: float | Callable[[str], float], what: str) -> None:
    assert got.keys() == want.keys(), f"{what}: {sorted(got)} against {sorted(want)}"
    for name in want:
        limit = bound if isinstance(bound, float) else bound(name)
        found = error(got[name], want[name])
        assert found <= limit, f"{what}: {name} is off by {found:.1e}, at most {limit:.1e} is allowed"


def copied(state: Any) -> Any:
    return map_leaves(state, lambda path, kind, t: t.clone())


def rows(state: Any, index: slice) -> Any:
    return map_leaves(state, lambda path, kind, t: t[index].clone())


def flat(state: Any) -> Named:
    return {f"state.{path}": t for path, _, t in leaves(state)}


def forward_backward(layer: nn.Module, x: Tensor, state: Any, cu_seqlens: Tensor | None = None) -> Named:
    """Outputs, final state, and the gradient of every input, parameter and state under random upstream gradients."""
    layer = copy.deepcopy(layer)
    x = x.clone().requires_grad_()
    if state is not None:
        state = map_leaves(state, lambda p, k, t: t.clone().requires_grad_() if _has_gradient(t) else t.clone())
    y, after = layer(x, state=state, cu_seqlens=cu_seqlens)
    found = {"y": y} | (flat(after) if after is not None else {})
    targets = [t for t in found.values() if t.requires_grad]
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in targets]
    sources = {"x": x} | dict(layer.named_parameters())
    if state is not None:
        sources |= {name: t for name, t in flat(state).items() if t.requires_grad}
    gradients = torch.autograd.grad(targets, list(sources.values()), upstream, allow_unused=True)
    zeros = [torch.zeros_like(s) if g is None else g for s, g in zip(sources.values(), gradients, strict=True)]
    return {k: t.detach() for k, t in found.items()} | {f"d {k}": g for k, g in zip(sources, zeros, strict=True)}


def _has_gradient(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def reference(layer: nn.Module, x: Tensor, state: Any, cu_seqlens: Tensor | None = None) -> Named:
    with backend("naive"):
        return forward_backward(layer, x, state, cu_seqlens)


# The properties


class NotApplicableError(Exception):
    """The layer does not promise what the property is about."""


def needs(condition: Callable[[Subject], str | None]) -> Callable[[Property], Property]:
    """A property of layers for which `condition` gives no reason against it."""

    def wrap(prop: Property) -> Property:
        @wraps(prop)
        def checked(s: Subject) -> None:
            if reason := condition(s):
                raise NotApplicableError(reason)
            prop(s)

        return checked

    return wrap


def decoding(s: Subject) -> str | None:
    return None if s.decodes else "the layer has no init_state"


def causal(s: Subject) -> str | None:
    return None if s.causal else "the layer reads the whole sequence"


def smooth(s: Subject) -> str | None:
    return "the layer's choices may fall the other way between near-ties" if s.discrete else None


def constructs_from_width(s: Subject) -> None:
    """Builds from d_model alone, takes keywords only and no **kwargs, and rejects a misspelt one."""
    signature = inspect.signature(s.make)
    kinds = [p.kind for name, p in signature.parameters.items() if name != "d_model"]
    assert inspect.Parameter.VAR_KEYWORD not in kinds, "the constructor swallows unknown arguments (**kwargs)"
    assert all(k is inspect.Parameter.KEYWORD_ONLY for k in kinds), "arguments after d_model must be keyword-only"
    s.make(s.d_model)


def keeps_the_signature(s: Subject) -> None:
    """(y, None) without a state, y shaped like x; a state is a NamedTuple of declared kinds, sequences first."""
    x = s.inputs(3, min(7, s.max_len))
    y, nothing = s.layer(x)
    assert nothing is None, f"without a state, None must come back, not {type(nothing).__name__}"
    assert y.shape == x.shape and y.dtype == x.dtype, f"y is {tuple(y.shape)} {y.dtype}, x {tuple(x.shape)} {x.dtype}"
    if not s.decodes:
        return
    before = s.layer.init_state(3, 16)
    for path, kind, t in leaves(before):
        assert t.shape[0] == 3, f"state field {path} is {tuple(t.shape)}; sequences come first"
        assert kind == "count" or t.dim() >= 2, f"state field {path} is {tuple(t.shape)}"
    after = s.layer(x, before)[1]
    same = [(p, k, t.shape, t.dtype) for p, k, t in leaves(after)] == [
        (p, k, t.shape, t.dtype) for p, k, t in leaves(s.layer.init_state(3, 16))
    ]
    assert type(after) is type(before) and same, "the new state differs from init_state's in type, shapes or dtypes"


def matches_the_oracle(s: Subject) -> None:
    """Outputs, final state and every gradient equal the naive recurrence's in float64, for many lengths."""
    for i, time in enumerate(t for t in LENGTHS if t <= s.max_len):
        batch = (1, 3)[i % 2]
        x = s.inputs(batch, time)
        state = (
            s.state(s.layer, batch, time)
            if s.decodes and i % 3
            else s.layer.init_state(batch, time)
            if s.decodes
            else None
        )
        got, want = forward_backward(s.layer, x, state), reference(s.layer, x, state)
        assert_close(got, want, EXACT, f"T = {time}, batch {batch}, float64")


@needs(smooth)
def matches_the_oracle_in_float32(s: Subject) -> None:
    """In float32 the error is at most max(1e-5, three times that of the naive form in float32)."""
    layer32 = copy.deepcopy(s.layer).float()
    for time in (t for t in (7, 65, 200) if t <= s.max_len):
        x = s.inputs(2, time, torch.float32)
        state = s.state(s.layer, 2, time) if s.decodes else None
        state32 = None if state is None else map_leaves(state, lambda p, k, t: t.to(_SINGLE.get(t.dtype, t.dtype)))
        exact = copy.deepcopy(layer32).double()
        wide = None if state is None else map_leaves(state32, lambda p, k, t: t.to(_DOUBLE.get(t.dtype, t.dtype)))
        want = reference(exact, x.double(), wide)
        plain = reference(layer32, x, state32)
        bound = {name: max(1e-5, 3 * error(plain[name], want[name])) for name in want}
        assert_close(forward_backward(layer32, x, state32), want, bound.__getitem__, f"T = {time}, float32")


@needs(smooth)
def survives_bfloat16(s: Subject) -> None:
    """With bf16 parameters what accumulates stays float32 and the error stays within twice the naive form's."""
    low = copy.deepcopy(s.layer).bfloat16()
    time = min(130, s.max_len)
    x = s.inputs(2, time, torch.bfloat16)
    exact = copy.deepcopy(low).double()
    y = low(x)[0]
    assert y.dtype == torch.bfloat16, f"y is {y.dtype} for bf16 input"
    with backend("naive"):
        want, plain = exact(x.double())[0], low(x)[0]
    limit = max(2 * error(plain, want), 1e-2)
    assert error(y, want) <= limit, f"bf16 output is off by {error(y, want):.1e}, at most {limit:.1e} is allowed"
    if s.decodes:
        for path, kind, t in leaves(low.init_state(2, 8)):
            if kind == "recurrent" and path in ("S", "h", "z"):
                wide = accumulator_dtype(torch.bfloat16)
                assert torch.promote_types(t.dtype, wide) == t.dtype, f"state {path} accumulates in {t.dtype}"


def takes_inputs_of_any_size(s: Subject) -> None:
    """Inputs 1e-4 to 1e6 times as large leave finite what is finite in the naive form, gradients too, in float32."""
    layer = copy.deepcopy(s.layer).float()
    for scale in (1e-4, 1e4, 1e6):
        x = scale * s.inputs(2, min(40, s.max_len), torch.float32)
        got, want = forward_backward(layer, x, None), reference(layer, x, None)
        broken = [name for name in want if want[name].isfinite().all() and not got[name].isfinite().all()]
        assert not broken, f"for inputs of {scale:g}, {', '.join(broken)} are not finite"


@needs(decoding)
def splits_anywhere(s: Subject) -> None:
    """Twenty random partitions of a sequence through the carried state agree with one call."""
    time = min(150, s.max_len)
    x = s.inputs(2, time)
    with torch.no_grad():
        y, last = s.layer(x, s.layer.init_state(2, time))
        want = {"y": y} | flat(last)
        for i in range(20):
            n_cuts = int(torch.randint(1, 12, ()))
            cuts = [0, *sorted(torch.randint(0, time + 1, (n_cuts,)).tolist()), time]
            state, parts = s.layer.init_state(2, time), []
            for a, b in pairwise(cuts):
                if b > a:
                    part, state = s.layer(x[:, a:b], state)
                    parts.append(part)
            assert_close({"y": torch.cat(parts, 1)} | flat(state), want, EXACT, f"partition {i} at {cuts}")


@needs(decoding)
def state_none_is_position_zero(s: Subject) -> None:
    """`state=None` gives the outputs of `init_state`."""
    x = s.inputs(2, min(70, s.max_len))
    with torch.no_grad():
        got, want = s.layer(x)[0], s.layer(x, s.layer.init_state(2, x.shape[1]))[0]
    assert error(got, want) <= EXACT, f"outputs differ by {error(got, want):.1e}"


@needs(decoding)
def gradients_cross_states(s: Subject) -> None:
    """Backpropagation through the carried state of two calls equals that of one."""
    x, cut = s.inputs(1, 70), 41
    weight = torch.randn_like(x)

    def gradient(parts: list[Tensor], source: Tensor) -> Tensor:
        state, outs = s.layer.init_state(1, 70), []
        for part in parts:
            y, state = s.layer(part, state)
            outs.append(y)
        return torch.autograd.grad((torch.cat(outs, 1) * weight).sum(), source)[0]

    whole = x.clone().requires_grad_()
    halves = x.clone().requires_grad_()
    got, want = gradient([halves[:, :cut], halves[:, cut:]], halves), gradient([whole], whole)
    assert error(got, want) <= EXACT, f"the gradient of x is off by {error(got, want):.1e}"


def packs(s: Subject) -> None:
    """Packed rows equal single sequences: outputs and states; empty ones keep their state, padding gives zero."""
    lengths = [5, 0, 70, 1, 0, 33]
    cu = cu_seqlens_of(torch.tensor(lengths))
    total, tail = sum(lengths), 6
    x = s.inputs(1, total + tail)
    for state in (None, s.state(s.layer, len(lengths), 80)) if s.decodes else (None,):
        with torch.no_grad():
            y, last = s.layer(x, None if state is None else copied(state), cu)
        assert y[:, total:].abs().max() == 0, "rows past the last sequence must give zero"
        for n, ((a, b), length) in enumerate(zip(pairwise(cu.tolist()), lengths, strict=True)):
            one = None if state is None else rows(state, slice(n, n + 1))
            if length:
                with torch.no_grad():
                    want, one = s.layer(x[:, a:b], one)
                found = error(y[:, a:b], want)
                assert found <= EXACT, f"sequence {n} of length {length}: y is off by {found:.1e}"
            for name, t in flat(one).items() if one is not None else ():
                found = error(flat(last)[name][n : n + 1], t)
                assert found <= (EXACT if length else 0.0), (
                    f"sequence {n} of length {length}: {name} is off by {found:.1e}"
                )
    with torch.no_grad():
        garbage = torch.cat([x[:, :total], 1e3 * torch.randn_like(x[:, total:])], 1)
        found = error(s.layer(garbage, None, cu)[0], s.layer(x, None, cu)[0])
    assert found <= EXACT, f"what stands in padding rows changes outputs by {found:.1e}"


def packed_gradients(s: Subject) -> None:
    """Every gradient of a packed row equals the naive form's."""
    cu = cu_seqlens_of(torch.tensor([0, 70, 3, 0]))
    x = s.inputs(1, 78)
    state = s.state(s.layer, 4, 80) if s.decodes else None
    assert_close(forward_backward(s.layer, x, state, cu), reference(s.layer, x, state, cu), EXACT, "packed row")


@needs(decoding)
def ragged_batches_agree(s: Subject) -> None:
    """Prompts of different lengths, packed, then decoded as a batch, equal each alone."""
    lengths = [3, 40, 17]
    cu = cu_seqlens_of(torch.tensor(lengths))
    x, steps = s.inputs(1, sum(lengths)), s.inputs(3, 4)
    with torch.no_grad():
        _, state = s.layer(x, s.layer.init_state(3, 50), cu)
        together = []
        for t in range(4):
            y, state = s.layer(steps[:, t : t + 1], state)
            together.append(y)
        for n, (a, length) in enumerate(zip(cu.tolist(), lengths, strict=False)):
            _, alone = s.layer(x[:, a : a + length], s.layer.init_state(1, 50))
            want, _ = s.layer(steps[n : n + 1], alone)
            found = error(torch.cat(together, 1)[n : n + 1], want)
            assert found <= EXACT, f"sequence {n} decoded in a batch is off by {found:.1e}"


def batch_order_is_free(s: Subject) -> None:
    """Permuting the batch permutes the outputs."""
    x, order = s.inputs(3, min(65, s.max_len)), torch.tensor([2, 0, 1])
    with torch.no_grad():
        found = error(s.layer(x[order])[0], s.layer(x)[0][order])
    assert found <= EXACT, f"outputs differ by {found:.1e}"


def takes_nothing(s: Subject) -> None:
    """No tokens, no sequences, or padding alone: outputs are empty or zero, the state as it was, and backward works."""
    for batch, time, bounds in (
        (2, 0, None),
        (0, 3, None),
        (1, 0, [0]),
        (1, 4, [0]),
        (1, 0, [0, 0]),
        (1, 4, [0, 0, 0]),
    ):
        cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        count = batch if bounds is None else len(bounds) - 1
        what = f"x of {batch} by {time} tokens" + ("" if bounds is None else f" with cu_seqlens {bounds}")
        x = s.inputs(batch, time)
        for state in (None, rows(s.state(s.layer, max(count, 1), 9), slice(0, count))) if s.decodes else (None,):
            found = forward_backward(s.layer, x, state, cu)
            with torch.no_grad():
                y, after = s.layer(x, None if state is None else copied(state), cu)
            assert y.shape == x.shape and not y.any(), f"{what}: y is {tuple(y.shape)}, or not zero"
            assert not found["y"].any() and not found["d x"].any(), f"{what}: y or its gradient is not zero"
            kept = {} if state is None else flat(state)
            for name, t in kept.items():
                same = torch.equal(found[name], t) and torch.equal(flat(after)[name], t)
                assert same, f"{what}: the new {name} differs from the old"


def rejects_bad_boundaries(s: Subject) -> None:
    """Boundaries that cannot be meant, or a state of another number of sequences, end in a UserError on the CPU."""
    x = s.inputs(1, 9)
    cases: list[tuple[str, Tensor, Tensor]] = [
        (what, x, torch.tensor(bounds))
        for what, bounds in {
            "boundaries that decrease": [0, 5, 3, 9],
            "boundaries that start at 2": [2, 9],
            "boundaries past the end": [0, 4, 10],
            "negative boundaries": [0, -1],
            "fractions": [0.0, 9.0],
            "booleans": [False, True],
            "a matrix": [[0, 4], [4, 9]],
            "no boundaries": [],
            "a number": 9,
        }.items()
    ]
    cases.append(("two rows", s.inputs(2, 9), torch.tensor([0, 4, 9])))
    for what, tokens, cu in cases:
        _assert_refused(what, lambda tokens=tokens, cu=cu: s.layer(tokens, None, cu))
    if s.decodes and leaves(s.layer.init_state(1, 20)):
        state = s.layer.init_state(3, 20)
        _assert_refused("a state of 3 for 2 packed", lambda: s.layer(x, state, torch.tensor([0, 4, 9])))
        _assert_refused("a state of 3 for a batch of 1", lambda: s.layer(x, state))


def _assert_refused(what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except UserError:
        return
    except Exception as wrong:
        raise AssertionError(f"{what} end in {type(wrong).__name__}, not in a UserError") from wrong
    raise AssertionError(f"{what} are computed silently")


def isolates_sequences(s: Subject) -> None:
    """NaN in some sequences' inputs and states, and in padding rows, leaves the others bit-identical: outputs, new
    states, gradients of inputs and states."""
    cu = cu_seqlens_of(torch.tensor([9, 5, 60, 0, 1, 12]))
    layouts = [(min(70, s.max_len), None, False), (cu[-1].item() + 6, cu, False)]
    layouts += [(min(20, s.max_len), None, True), (1, None, True), (cu[-1].item() + 6, cu, True)] if s.decodes else []
    exact = getattr(s.layer, "causality", "exact") == "exact"
    for time, packed, carried in layouts:
        count = 3 if packed is None else len(packed) - 1
        x = s.inputs(1 if packed is not None else count, time)
        state = s.state(s.layer, count, 80) if carried else None
        bad, bad_state = _poisoned(x, state, packed)
        want, got = (_of_the_others(s.layer, *each, packed) for each in ((x, state), (bad, bad_state)))
        same = torch.equal if exact else lambda a, b: error(a, b) <= EXACT
        changed = [name for name in want if not same(got[name], want[name])]
        layout = f"{'a batch' if packed is None else 'a packed row'}{' with a state' if carried else ''}"
        assert not changed, f"NaN in some sequences of {layout} of {time} tokens reaches others: {', '.join(changed)}"


def _poisoned(x: Tensor, state: Any, cu: Tensor | None) -> tuple[Tensor, Any]:
    """x and the state with NaN in sequences 0 and 2: all of 0, the second half of 2; and in padding."""
    bad = x.clone()
    for n in (0, 2):
        row, a, b = _span(x, n, cu)
        bad[row, (a if n == 0 else (a + b) // 2) : b] = torch.nan
    if cu is not None:
        bad[:, cu[-1] :] = torch.nan
    if state is None:
        return bad, None
    victims = torch.tensor([0, 2])
    return bad, map_leaves(state, lambda p, k, t: t.index_fill(0, victims, torch.nan) if _has_gradient(t) else t)


def _span(x: Tensor, n: int, cu: Tensor | None) -> tuple[int, int, int]:
    """Where sequence n lies in x: its row, its first token, the one past its last."""
    return (n, 0, x.shape[1]) if cu is None else (0, int(cu[n]), int(cu[n + 1]))


def _of_the_others(layer: nn.Module, x: Tensor, state: Any, cu: Tensor | None) -> Named:
    """What belongs to every sequence but 0 and 2, with and without gradients recorded; outputs of padding as well."""
    count = x.shape[0] if cu is None else len(cu) - 1
    others = [n for n in range(count) if n not in (0, 2)]

    def split(y: Tensor) -> Tensor:
        return torch.cat([y[row, a:b] for row, a, b in (_span(x, n, cu) for n in others)])

    def found(y: Tensor, after: Any) -> Named:
        states = {} if state is None else {name: t[others] for name, t in flat(after).items()}
        return {"y": split(y), "padding": y[:, x.shape[1] if cu is None else cu[-1] :]} | states

    with torch.no_grad():
        plain = found(*layer(x, None if state is None else copied(state), cu))
    sources = {"x": x.clone().requires_grad_()}
    before = None
    if state is not None:
        before = map_leaves(state, lambda p, k, t: t.clone().requires_grad_() if _has_gradient(t) else t.clone())
        sources |= {name: t for name, t in flat(before).items() if t.requires_grad}
    traced = found(*layer(sources["x"], before, cu))
    targets = [t for t in traced.values() if t.requires_grad]
    upstream = [torch.ones_like(t) for t in targets]
    gradients = torch.autograd.grad(targets, list(sources.values()), upstream, materialize_grads=True)
    kept = [split(g) if name == "x" else g[others] for name, g in zip(sources, gradients, strict=True)]
    return (
        {f"{name} under no_grad": t for name, t in plain.items()}
        | {name: t.detach() for name, t in traced.items()}
        | {f"d {name}": g for name, g in zip(sources, kept, strict=True)}
    )


@needs(causal)
def is_causal(s: Subject) -> None:
    """Changing token t changes no output before t: not at all, or by the order of summation where the layer says so."""
    layer = copy.deepcopy(s.layer).float()
    exact = getattr(s.layer, "causality", "exact") == "exact"
    for time, t in ((100, 1), (100, 37), (130, 64), (130, 129)):
        if time > s.max_len:
            continue
        x = s.inputs(2, time, torch.float32)
        changed = x.clone()
        changed[:, t:] += 3 * torch.randn_like(changed[:, t:])
        with torch.no_grad():
            a, b = layer(x)[0], layer(changed)[0]
        leak = (a[:, :t] - b[:, :t]).abs().max().item()
        limit = 0.0 if exact else 1e-5 * a.abs().max().item()
        assert leak <= limit, f"changing token {t} of {time} changes earlier outputs by {leak:.1e}"
        assert (a[:, t:] - b[:, t:]).abs().max() > 0, f"changing token {t} of {time} changes nothing at all"


@needs(decoding)
def writes_in_place(s: Subject) -> None:
    """Under no_grad the new state has the donated one's addresses; under grad the donated one is untouched."""
    cu = cu_seqlens_of(torch.tensor([4, 0, 9]))
    for what, x, packed in (
        ("1 token", s.inputs(3, 1), None),
        ("9", s.inputs(3, 9), None),
        ("packed", s.inputs(1, 15), cu),
    ):
        with torch.no_grad():
            before = s.state(s.layer, 3, 32)
            addresses = [t.data_ptr() for _, _, t in leaves(before)]
            after = s.layer(x, before, packed)[1]
        assert [t.data_ptr() for _, _, t in leaves(after)] == addresses, f"{what}: the state moved under no_grad"
        before = s.state(s.layer, 3, 32)
        kept = copied(before)
        s.layer(x, before, packed)
        for name, t in flat(before).items():
            assert torch.equal(t, flat(kept)[name]), f"{what}: {name} was changed while gradients are recorded"


@needs(decoding)
def state_size_is_as_declared(s: Subject) -> None:
    """State bytes depend on max_len only where the layer says so, and never on the tokens seen."""

    def size(state: Any) -> int:
        return sum(t.numel() * t.element_size() for _, _, t in leaves(state))

    few, many = min(1_000, s.max_len), min(64_000, s.max_len)
    small, large = s.layer.init_state(1, few), s.layer.init_state(1, many)
    if getattr(s.layer, "constant_state", True):
        assert size(small) == size(large), f"{size(small)} bytes for {few:,} tokens, {size(large)} for {many:,}"
    time = min(90, s.max_len)
    with torch.no_grad():
        after = s.layer(s.inputs(1, time), s.layer.init_state(1, few))[1]
    assert size(after) == size(small), f"{size(small)} bytes before, {size(after)} after {time} tokens"


def takes_strided_inputs(s: Subject) -> None:
    """Non-contiguous inputs and expanded upstream gradients give what contiguous ones give."""
    time = min(65, s.max_len)
    x = s.inputs(2, time)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)

    def gradient(x: Tensor, upstream: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(s.layer(x)[0], x, upstream)[0]

    want = gradient(x, torch.ones_like(x))
    for got in (gradient(strided, torch.ones_like(x)), gradient(x, torch.ones((), dtype=x.dtype).expand_as(x))):
        assert error(got, want) <= EXACT, f"the gradient of x is off by {error(got, want):.1e}"


def uses_every_parameter(s: Subject) -> None:
    """Every parameter has a gradient that is not zero."""
    s.layer(s.inputs(2, min(130, s.max_len)))[0].square().sum().backward()
    idle = [name for name, p in s.layer.named_parameters() if p.grad is None or not p.grad.any()]
    s.layer.zero_grad(set_to_none=True)
    assert not idle, f"nothing depends on {', '.join(idle)}"


def saves_and_restores(s: Subject) -> None:
    """A layer rebuilt from its state_dict computes the same."""
    x = s.inputs(1, min(33, s.max_len))
    torch.manual_seed(99)
    other = s.make(s.d_model, **s.arguments).to(torch.float64)
    other.load_state_dict(s.layer.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x)[0], s.layer(x)[0]), "the rebuilt layer computes something else"


def autocasts(s: Subject) -> None:
    """Under autocast it trains: finite outputs close to float32's, and a finite gradient of every parameter."""
    layer = copy.deepcopy(s.layer).float()
    x = s.inputs(2, min(66, s.max_len), torch.float32)
    want = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)[0]
    if not s.discrete:
        assert error(y, want) <= 5e-2, f"bf16 autocast changes outputs by {error(y, want):.1e}"
    y.float().square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is None or torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite"


def _properties() -> Iterator[tuple[str, Property]]:
    for prop in (
        constructs_from_width,
        keeps_the_signature,
        matches_the_oracle,
        matches_the_oracle_in_float32,
        survives_bfloat16,
        takes_inputs_of_any_size,
        splits_anywhere,
        state_none_is_position_zero,
        gradients_cross_states,
        packs,
        packed_gradients,
        ragged_batches_agree,
        batch_order_is_free,
        isolates_sequences,
        takes_nothing,
        rejects_bad_boundaries,
        is_causal,
        writes_in_place,
        state_size_is_as_declared,
        takes_strided_inputs,
        uses_every_parameter,
        saves_and_restores,
        autocasts,
    ):
        yield prop.__name__, prop


PROPERTIES: dict[str, Property] = dict(_properties())
