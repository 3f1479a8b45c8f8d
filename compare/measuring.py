"""Measuring layers and models: time, memory, energy and state of training, of reading and of decoding.

Training is a forward and a backward pass; prefill reads all tokens without gradients, with a state where there is one.
Times are on the wall clock, medians and quartiles. Decode reads single tokens after that, in turn at every context, so
that what else the machine does falls on all contexts alike. A layer's mixing op is measured alone too: called as the
layer called it, on the very tensors.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import log
from statistics import quantiles
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from subquad.compare.costs import count, count_op, mixing
from subquad.compare.meters import free_bytes, joules, peak_bytes, release
from subquad.compare.results import Kind, Phase, Point
from subquad.compare.subjects import Subject
from subquad.errors import UserError, one_line
from subquad.infer.state import mark, nbytes, rewind
from subquad.kernels.backend import Call, recorded_calls
from subquad.kernels.state import leaves
from subquad.layers.base import dtype_of

PIECE = 4096  # tokens read at a time on the way to a context whose reading is not measured
WARM_UP = 3  # decoded tokens that do not count
ENOUGH = 1.0  # seconds of repeats
LONG = 10.0  # seconds of a run that is not repeated on a CPU
SPARE = 0.1  # of the free memory
UNFIT = "does not fit"
WHOLE = "cannot decode: reads whole sequences"


class Setting(NamedTuple):
    batch: int
    new_tokens: int
    repeat: int
    device: torch.device


class Trial(NamedTuple):
    run: Callable[[], Any]
    prepare: Callable[[], object] = lambda: None  # before each run, outside of its time


class Limit:
    """Refuses what would not fit the memory or the time, judged from shorter lengths.

    Each of the subjects that are left may spend an equal part of the seconds that are left on one measurement.
    """

    def __init__(self, device: torch.device, seconds: float | None, subjects: int):
        self.device, self.subjects = device, subjects
        self.end = None if seconds is None else perf_counter() + seconds

    @property
    def spent(self) -> bool:
        return self.end is not None and perf_counter() >= self.end

    def refusal(self, earlier: Sequence[Point], point: Point) -> str:
        """Why a point is not measured, from those of fewer tokens; empty where it is."""
        known = [p for p in earlier if p.ms is not None]
        stuck = earlier[-1].note if earlier and earlier[-1].note.startswith(UNFIT) else ""
        need = needed(known, point)
        if need and (stuck or not self.fits(need)):
            return f"{UNFIT}: needs about {need / 1e9:,.2g} GB"
        if stuck or not known:
            return stuck
        seconds = predict(known, point, "ms") / 1000
        if self.end is not None and 2 * seconds + ENOUGH > max(0.0, self.end - perf_counter()) / self.subjects:
            return f"left out: would take about {seconds:,.2g} s, more than its share of the time that is left"
        return ""

    def fits(self, need: float) -> bool:
        if need <= (1 - SPARE) * free_bytes(self.device):
            return True
        release(self.device)
        return need <= (1 - SPARE) * free_bytes(self.device)


def needed(known: Sequence[Point], point: Point) -> float:
    """Bytes at the peak, as far as shorter lengths tell; 0 where they do not."""
    return predict(known, point, "peak_bytes") if known else 0.0


def predict(known: Sequence[Point], point: Point, name: Literal["ms", "peak_bytes"]) -> float:
    """The figure of `point` from those of fewer tokens, log on log.

    Along the line through the last two, of a slope from 1 to 2. After a single one as the counted FLOPs grow, memory
    as the tokens.
    """
    *before, last = known
    figure = getattr(last, name) or 0
    slope = 1.0
    if before and figure and (earlier := getattr(before[-1], name)):
        slope = log(figure / earlier) / log(last.tokens / before[-1].tokens)
    elif name == "ms" and last.flops and point.flops:
        slope = log(point.flops / last.flops) / log(point.tokens / last.tokens)
    return figure * (point.tokens / last.tokens) ** min(max(slope, 1.0), 2.0)


def measure(
    subject: Subject, lengths: Sequence[int], phases: Sequence[Phase], setting: Setting, limit: Limit
) -> Iterator[Point]:
    """Every point of one subject, lengths ascending, and those of a layer's mixing op alone."""
    yield from _Bench(subject, setting, limit).points(lengths, phases)


class _Bench:
    def __init__(self, subject: Subject, setting: Setting, limit: Limit):
        self.subject, self.setting, self.limit = subject, setting, limit
        self.module = subject.build()
        self.room = 2 * (setting.new_tokens + WARM_UP + 2)  # the op's turns write as well
        self.earlier: dict[tuple[Kind, Phase], list[Point]] = defaultdict(list)

    def points(self, lengths: Sequence[int], phases: Sequence[Phase]) -> Iterator[Point]:
        states: dict[int, Any] = {}
        notes: dict[int, str] = {}
        for tokens in lengths:
            x = self.subject.inputs(self.setting.batch, tokens)
            if "prefill" in phases:
                found, states[tokens] = self.both("prefill", x, self.reading(x), self.op_reading)
                notes[tokens] = found[0].note
                yield from found
            elif "decode" in phases:
                states[tokens], notes[tokens] = self.read_in_pieces(x)
            if "train" in phases:
                yield from self.both("train", x, self.training(x), self.op_training)[0]
                self.module.zero_grad(set_to_none=True)
        if "decode" in phases:
            yield from self.decoding(lengths, states, notes)

    def both(
        self, phase: Phase, x: Tensor, whole: Trial, op: Callable[[Tensor], Trial | None]
    ) -> tuple[list[Point], Any]:
        """The points of the subject and of its op, and what the last run of the subject gave."""
        point, result = self.attempt(self.subject.kind, phase, x.shape[1], lambda: whole)
        if self.subject.kind == "model":
            return [point], result
        if point.ms is None:
            return [point, replace(self.counted("op", phase, x.shape[1]), note=point.note)], None
        alone, _ = self.attempt("op", phase, x.shape[1], partial(op, x))
        return [point] if alone is None else [point, alone], result

    def attempt(self, kind: Kind, phase: Phase, tokens: int, trial: Callable[[], Trial | None]) -> tuple[Any, Any]:
        """The point measured, or one with a note, and what the last run gave; no point where there is no trial."""
        point, result = self.counted(kind, phase, tokens), None
        earlier = self.earlier[kind, phase]
        point = replace(point, note=self.limit.refusal(earlier, point))
        if not point.note:
            try:
                tried = trial()
                if tried is None:
                    return None, None
                point, result = timed(point, tried, self.setting, warm_up=not earlier)
            except UserError as error:
                point = replace(point, note=one_line(error))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                need = needed([p for p in earlier if p.ms is not None], point)
                point = replace(point, note=f"{UNFIT}: needs about {need / 1e9:,.2g} GB" if need else UNFIT)
            if point.note:  # what the failed run held is free only now
                release(self.setting.device)
        if kind != "op" and phase == "prefill":
            point = replace(point, state_bytes=self.state_bytes(tokens))
        earlier.append(point)
        return point, result

    def counted(self, kind: Kind, phase: Phase, tokens: int) -> Point:
        """The point with its FLOPs and bytes, where they can be counted."""
        point = Point(self.subject.name, kind, phase, tokens)
        count_it, dtype = count_op if kind == "op" else count, dtype_of(self.module)
        try:
            flops, moved = count_it(self.module, phase, self.setting.batch, tokens, self.subject.d_model, dtype)
        except (UserError, RuntimeError):  # RuntimeError: someone's layer that looks at values
            return point
        return replace(point, flops=flops or None, bytes=moved or None)

    def state(self, tokens: int) -> Any:
        """An empty one, with room for the decoded tokens where the layer serves so many; None where there is none."""
        if not hasattr(self.module, "init_state"):
            return None
        batch = self.setting.batch
        for length in (tokens + self.room, tokens):
            try:
                return self.module.init_state(batch, length)
            except UserError:
                continue
        return None

    def state_bytes(self, tokens: int) -> int | None:
        """Of a state for just so many tokens, without room for more."""
        if not hasattr(self.module, "init_state"):
            return None
        try:
            return nbytes(self.module.init_state(self.setting.batch, tokens))
        except UserError:
            return None

    def reading(self, x: Tensor) -> Trial:
        def run() -> Any:
            with torch.no_grad():
                return self.subject.read(self.module, x, self.state(x.shape[1]))[1]

        return Trial(run)

    def training(self, x: Tensor) -> Trial:
        upstream: list[Tensor] = []

        def run() -> None:
            y, _ = self.module(x.detach().requires_grad_() if x.is_floating_point() else x)
            upstream or upstream.append(torch.randn_like(y))
            y.backward(upstream[0])

        return Trial(run, partial(self.module.zero_grad, set_to_none=True))

    def op_reading(self, x: Tensor) -> Trial | None:
        state, empty = self.state(x.shape[1]), self.state(x.shape[1])
        with torch.no_grad(), recorded_calls() as calls:
            self.module(x, state)
        calls = mixing(self.module, calls)

        def prepare() -> None:
            for (_, _, used), (_, _, fresh) in zip(leaves(state or ()), leaves(empty or ()), strict=True):
                used.copy_(fresh)

        return Trial(partial(call_again, calls), prepare) if calls else None

    def op_training(self, x: Tensor) -> Trial | None:
        with recorded_calls() as calls:
            self.module(x.detach().requires_grad_())
        calls = [as_leaves(call) for call in mixing(self.module, calls)]
        upstream: dict[int, Tensor] = {}

        def run() -> None:
            for i, call in enumerate(map(as_leaves, calls)):
                out = pytree.tree_leaves(call.form(*call.args, **call.kwargs))[0]
                if out.requires_grad:
                    if i not in upstream:
                        upstream[i] = torch.randn_like(out)
                    out.backward(upstream[i])

        return Trial(run) if calls else None

    def read_in_pieces(self, x: Tensor) -> tuple[Any, str]:
        """The state after x, or None and why there is none."""
        try:
            with torch.no_grad():
                state = self.state(x.shape[1])
                for piece in x.split(PIECE, 1) if state is not None else ():
                    _, state = self.subject.read(self.module, piece, state)
            return state, ""
        except UserError as error:
            return None, one_line(error)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        release(self.setting.device)
        return None, UNFIT

    def decoding(self, lengths: Sequence[int], states: dict[int, Any], notes: dict[int, str]) -> Iterator[Point]:
        """One token after each context; `notes` say why there is no state to start from."""
        x = self.subject.inputs(self.setting.batch, 1)
        points = {n: self.counted(self.subject.kind, "decode", n) for n in lengths}
        steps, ops = {}, {}
        for tokens in lengths:
            if states[tokens] is None:
                points[tokens] = replace(points[tokens], note=notes[tokens] or self.stateless(tokens))
                continue
            step = _Step(self.subject, self.module, x, states.pop(tokens))
            try:
                _, peak = peak_bytes(step, self.setting.device)
                with recorded_calls() as calls:
                    step()
            except UserError as error:
                points[tokens] = replace(points[tokens], note=one_line(error))
                continue
            points[tokens] = replace(points[tokens], peak_bytes=peak, state_bytes=self.state_bytes(tokens))
            steps[tokens] = step
            if self.subject.kind == "layer":
                ops[tokens] = partial(call_again, mixing(self.module, calls))
        turns, device = self.setting.new_tokens, self.setting.device
        for tokens, ms in zip(steps, in_turns(list(steps.values()), turns, device), strict=True):
            points[tokens] = replace(points[tokens], energy_j=self.energy(steps[tokens]), **spread(ms))
        yield from points.values()
        if self.subject.kind == "layer" and (not ops or any(op.args[0] for op in ops.values())):
            alone = {n: replace(self.counted("op", "decode", n), note=p.note) for n, p in points.items()}
            for tokens, ms in zip(ops, in_turns(list(ops.values()), turns, device), strict=True):
                alone[tokens] = replace(alone[tokens], **spread(ms))
            yield from alone.values()

    def energy(self, step: "_Step") -> float | None:
        """Joules of a token: some are read after the same context over and over."""
        context, count = mark(step.state), self.setting.new_tokens

        def run() -> None:
            for _ in range(count):
                step()
            rewind(step.state, context)

        found = joules(run, self.setting.device)
        return None if found is None else found / count

    def stateless(self, tokens: int) -> str:
        """Why there is no state to decode so many tokens from."""
        if hasattr(self.module, "init_state"):
            try:
                self.module.init_state(self.setting.batch, tokens + self.room)
            except UserError as error:
                return one_line(error)
        return WHOLE


class _Step:
    """Reads one token; the state that it leaves is the next step's."""

    def __init__(self, subject: Subject, module: nn.Module, x: Tensor, state: Any):
        self.subject, self.module, self.x, self.state = subject, module, x, state

    @torch.no_grad()
    def __call__(self) -> None:
        _, self.state = self.subject.read(self.module, self.x, self.state)


def timed(point: Point, trial: Trial, setting: Setting, warm_up: bool) -> tuple[Point, Any]:
    """The point with its time, peak memory and energy, and what the last run gave.

    The first run counts for its peak alone: memory that was never touched takes longer, on a CPU several times as long.
    But a long one on a CPU is made once.
    """
    took: list[float] = []

    def run() -> Any:
        took.append(-next(clock))
        result = trial.run()
        took[-1] = 1e3 * (took[-1] + next(clock))
        return result

    clock = seconds(setting.device)
    if warm_up:  # first calls load and compile
        trial.prepare()
        trial.run()
    trial.prepare()
    result, peak = peak_bytes(run, setting.device)
    if took[0] < 1e3 * LONG or setting.device.type != "cpu":
        took.clear()
        while not took or (len(took) < setting.repeat and sum(took) < 1e3 * ENOUGH):
            del result  # two at once would not be one run's memory
            trial.prepare()
            result = run()
    energy = joules(trial.run, setting.device)
    return replace(point, peak_bytes=peak, energy_j=energy, **spread(took)), result


def spread(ms: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles, as a point has them."""
    low, median, high = quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else 3 * list(ms)
    return {"ms": median, "low_ms": low, "high_ms": high}


def in_turns(steps: Sequence[Callable[[], object]], turns: int, device: torch.device) -> list[list[float]]:
    """Milliseconds of each step in so many turns, after some to warm up; every other turn goes backwards."""
    found: list[list[float]] = [[] for _ in steps]
    clock = seconds(device)
    for turn in range(WARM_UP + turns if steps else 0):
        order = range(len(steps))
        for i in order if turn % 2 else reversed(order):
            begin = next(clock)
            steps[i]()
            found[i].append(1e3 * (next(clock) - begin))
    return [ms[WARM_UP:] for ms in found]


def seconds(device: torch.device) -> Iterator[float]:
    """The wall clock when the device has done all that was asked of it."""
    while True:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        yield perf_counter()


def as_leaves(call: Call) -> Call:
    """The call on tensors without history, which want gradients where its own do."""
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), (call.args, call.kwargs)
    )
    return call._replace(args=args, kwargs=kwargs)


@torch.no_grad()
def call_again(calls: Sequence[Call]) -> None:
    for call in calls:
        call.form(*call.args, **call.kwargs)


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
