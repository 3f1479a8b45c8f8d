"""What `subquad doctor` does on a GPU: every Triton form and shipped configuration against float64, and its speed.

Checks run in processes of their own, several at a time: compiling is most of the work, and a kernel that writes where
it should not, or never ends, spoils only its own. What is wrong goes to the block list, what is right leaves it.
"""

import json
import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from math import inf, isnan
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from subquad.compare.kernel_cases import CASES, Case, Sizes
from subquad.compare.kernel_timing import copy_rate, floor, measure, trainable
from subquad.compare.kernel_tune import SHORT, TOLERANCE
from subquad.files import write_atomically
from subquad.kernels import blocked
from subquad.kernels.backend import backend
from subquad.kernels.blocked import Blocked
from subquad.kernels.examples import Example, carries, differences, examples, run_in_place, sensitivity
from subquad.kernels.examples import run as run_example
from subquad.kernels.triton import configs

Widths = tuple[int, int, torch.dtype]  # of keys and values

IN_PLACE = "in place"  # a few tokens
SETTINGS = (  # of examples, what takes longest first
    ("packed, carried", torch.bfloat16),
    ("packed, carried", torch.float32),
    ("fresh", torch.bfloat16),
    (IN_PLACE, torch.bfloat16),
    (IN_PLACE, torch.float32),
)
STATELESS = (("fresh", torch.bfloat16), ("fresh", torch.float32))  # of an op that carries nothing
USUAL = ((128, 128, torch.bfloat16), (64, 64, torch.bfloat16))  # checked whatever the table holds
SIZES = {2: torch.bfloat16, 4: torch.float32}  # by the bytes of an operand
TIMED = Sizes(8, 2048, 16, 128)
LIMIT_S = 300  # of one check
MEMORY = 2**30  # bytes of the GPU that a process is given room for
ROUNDINGS = 5  # an error may be as large as this many roundings of the inputs make it, where that is more


class Check(NamedTuple):
    """Variant number `variant` of an op's examples in a setting, or one of its cases at some widths."""

    op: str
    device: str
    dtype: torch.dtype
    variant: int = 0
    setting: str = ""
    case: str | None = None
    widths: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        if self.case is None:
            return f"example {self.variant + 1}, {self.setting},"
        return f"{self.case} at widths {self.widths[0]} and {self.widths[1]}"


class Outcome(NamedTuple):
    """Errors by name, with what is allowed where that is more than usual; why the form did not run; or why nothing can
    be said."""

    check: Check
    errors: Mapping[str, float]
    allowed: Mapping[str, float] = {}
    failure: str | None = None
    unknown: str | None = None

    def wrong(self) -> list[str]:
        """What is wrong with the op, as ends of sentences."""
        usual = TOLERANCE[self.check.dtype]
        found = [
            f"{name} is off by {x:.1e} in {str(self.check.dtype).removeprefix('torch.')}"
            for name, x in self.errors.items()
            if not x < max(usual, self.allowed.get(name, 0.0))  # NaN is not below it either
        ]
        return found + ([self.failure] if self.failure else [])


def checks(ops: Iterable[str], device: str, capability: tuple[int, int] | None = None) -> list[Check]:
    """All there is to check, what takes longest first; cases where the GPU's compute capability is given."""
    offered = {op: examples(op, time=2) for op in set(ops)}
    settings = {op: SETTINGS if carries(found[0].op) else STATELESS for op, found in offered.items()}
    variants = sorted((number, op) for op, found in offered.items() for number in range(_variants(found)))
    found = [
        Check(op, device, dtype, number, setting)
        for setting, dtype in dict.fromkeys((*SETTINGS, *STATELESS))
        for number, op in variants
        if (setting, dtype) in settings[op]
        and (device != "cpu" or dtype == torch.float32)  # the interpreter's bfloat16 is wrong
    ]
    if capability is not None:
        cases = [(case, at) for case, at in _cases(capability) if case.op in offered]
        found = [Check(case.op, device, at[2], case=case.name, widths=at[:2]) for case, at in cases] + found
    return found


def _variants(found: Sequence[Example]) -> int:
    return sum(example.name.endswith(", fresh") for example in found)


def _examples(check: Check) -> list[Example]:
    """Those of this check; each setting has all variants in the same order."""
    time = 3 if check.setting == IN_PLACE else 20 if check.device == "cpu" else 70  # the interpreter is slow
    found = examples(check.op, time=time, dtype=check.dtype, device=check.device)
    variants = _variants(found)
    mine = [e for number, e in enumerate(found) if number % variants == check.variant]
    if check.setting == IN_PLACE:
        return [e._replace(name=f"{e.name}, {IN_PLACE}") for e in mine if e.state is not None]
    return [e for e in mine if e.name.endswith(f", {check.setting}")]


class Running:
    """The checks of ops in processes, begun when this is made; `outcomes` waits for them."""

    def __init__(self, ops: Sequence[str], device: str):
        found = checks(ops, device, torch.cuda.get_device_capability(device))
        free, _ = torch.cuda.mem_get_info(device)
        at_once = max(1, min(len(found), os.cpu_count() or 1, free // MEMORY))
        self.workers: SimpleQueue[Worker] = SimpleQueue()
        for _ in range(at_once):
            self.workers.put(Worker())
        self.pool = ThreadPoolExecutor(at_once)
        self.futures = [self.pool.submit(self._run, check) for check in found]

    def _run(self, check: Check) -> Outcome:
        worker = self.workers.get()
        try:
            return worker.run(check)
        finally:
            self.workers.put(worker)

    def outcomes(self) -> list[Outcome]:
        with self.pool:
            found = [future.result() for future in self.futures]
        while not self.workers.empty():
            self.workers.get().stop()
        return found


class Worker:
    """A process that runs one check after the other; a new one once a check has failed in it."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, check: Check, limit: float = LIMIT_S) -> Outcome:
        try:
            self.pipe.send(check)
            if self.pipe.poll(limit):
                outcome = self.pipe.recv()
            else:
                outcome = Outcome(check, {}, failure=f"{check} does not end within {limit:g} s")
        except (EOFError, BrokenPipeError):
            self.process.join()
            outcome = Outcome(check, {}, failure=f"{check} ends its process with code {self.process.exitcode}")
        if outcome.failure:
            self.stop()
            self.start()
        return outcome

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            check = pipe.recv()
        except EOFError:
            return
        pipe.send(run(check))


def run(check: Check) -> Outcome:
    found: dict[str, float] = {}
    allowed: dict[str, float] = {}
    name, how = str(check), run_in_place if check.setting == IN_PLACE else run_example
    try:
        for example in [_at_widths(check)] if check.case else _examples(check):
            name = example.name
            with blocked.ignored():
                seen = differences(example, "triton", how)
            found |= {f"{name}: {what}": x for what, x in seen.items()}
            if any(x >= TOLERANCE[check.dtype] for x in seen.values()):
                moved = sensitivity(example, torch.finfo(check.dtype).eps / 2, how)
                allowed |= {f"{name}: {what}": ROUNDINGS * x for what, x in moved.items()}
            if check.widths == (TIMED.D, TIMED.D):
                _as_timed(example, check)
    except torch.OutOfMemoryError:
        return Outcome(check, found, unknown=f"{check.op}: not enough GPU memory for {name}")
    except Exception as error:  # a compiler's or a driver's, whatever it is: the form does not run here
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Outcome(check, found, failure=f"{name} does not run ({why})")
    return Outcome(check, found, allowed)


def _as_timed(example: Example, check: Check) -> None:
    """Compile here, beside other processes, what `speeds` launches besides: no gradients, or none of constants."""
    tensors = trainable(example.inputs, _case(check).constants)
    with backend("triton"), blocked.ignored():
        out = example._replace(inputs=tensors).call()[0]
        torch.autograd.grad(out, [x for x in tensors.values() if x.requires_grad], torch.ones_like(out))
        with torch.no_grad():
            example.call()


def _case(check: Check) -> Case:
    return next(case for case in CASES if case.name == check.case)


def _at_widths(check: Check) -> Example:
    # With the heads of what is timed afterwards, which is compiled by that; else with few, as the plain form is slow.
    heads = TIMED.H if check.widths == (TIMED.D, TIMED.D) else 2
    example = _case(check).example(Sizes(1, SHORT, heads, *check.widths), check.dtype, torch.device(check.device))
    return example._replace(name=str(check))


def _cases(capability: tuple[int, int]) -> list[tuple[Case, Widths]]:
    """Every case at usual widths, and one that uses each other entry of the table, in each precision that does."""
    found: list[tuple[Case, Widths]] = []
    for kernel, known in configs.table().items():
        for entry in known.entries:
            if entry.capability == capability and "K" in entry.widths:
                for size in (entry.widths["size"],) if "size" in entry.widths else SIZES:
                    at = entry.widths["K"], entry.widths.get("V", entry.widths["K"]), SIZES[size]
                    users = [(case, at) for case in CASES if _uses(case, kernel, entry, size)]
                    users.sort(key=lambda user: _asks_less(user[0].kernels[kernel], entry))
                    if users and at not in USUAL and not any(user in found for user in users):
                        found.append(users[0])
    found.sort(key=lambda pair: pair[1][:2], reverse=True)  # what takes longest first
    return found + [(case, at) for at in USUAL for case in CASES]


def _uses(case: Case, kernel: str, entry: configs.Entry, size: int) -> bool:
    """Whether the kernel takes this entry in the case at the entry's own widths."""
    if kernel not in case.kernels:
        return False
    asked = {"V": entry.widths["K"], **entry.widths, **case.kernels[kernel], "size": size}
    return configs.chosen(kernel, entry.capability, asked) is entry.values


def _asks_less(asked: Mapping[str, int], entry: configs.Entry) -> bool:
    return any(value != entry.widths.get(name, value) for name, value in asked.items())


def verdicts(outcomes: Sequence[Outcome], title: str, bad: str) -> tuple[Table, dict[str, str], list[str]]:
    """The table, why each wrong op is wrong, and a line for everything that is off or could not be checked."""
    table = Table(title=title, title_justify="left")
    for heading in ("op", "checks", "float32", "bfloat16", "verdict"):
        table.add_column(heading, justify="left" if heading in ("op", "verdict") else "right")
    reasons, lines = {}, []
    for op in sorted({outcome.check.op for outcome in outcomes}):
        mine = [outcome for outcome in outcomes if outcome.check.op == op]
        wrong = [reason for outcome in mine for reason in outcome.wrong()]
        unknown = [outcome.unknown for outcome in mine if outcome.unknown]
        worst = []
        for dtype in (torch.float32, torch.bfloat16):
            seen = [x for outcome in mine if outcome.check.dtype == dtype for x in outcome.errors.values()]
            worst.append(f"{max(seen, key=lambda x: inf if isnan(x) else x):.1e}" if seen else "-")
        count = sum(len(outcome.errors) for outcome in mine)
        verdict = f"[bold]{bad}[/bold]" if wrong else "not checked" if unknown else "PASS"
        table.add_row(op, str(count), *worst, verdict)
        if wrong:
            reasons[op] = wrong[0]
        lines += [f"{op}, triton: {reason}" for reason in wrong] + unknown
    return table, reasons, lines


def keep_list(outcomes: Sequence[Outcome], reasons: dict[str, str], gpu: str, triton: str) -> list[str]:
    """Write the block list anew: the ops that are wrong on this GPU; says which ones left it and which ones came."""
    before = blocked.read()
    undecided = {outcome.check.op for outcome in outcomes if outcome.unknown} - set(reasons)
    decided = {outcome.check.op for outcome in outcomes} - undecided
    others = [e for e in before if e.op not in decided or (e.gpu, e.triton) != (gpu, triton)]
    today = date.today().isoformat()
    now = others + [Blocked(op, gpu, triton, reason, today) for op, reason in reasons.items()]
    if now == before:
        return []
    path = blocked.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([entry._asdict() for entry in now], indent=1) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"), overwrite=True)
    blocked.forget()
    cleared = [e.op for e in before if e not in others and e.op not in reasons]
    said = [f"{op} is right now; its Triton form runs again on {gpu}." for op in cleared]
    if reasons:
        said.append(f"Blocked on {gpu} with triton {triton}: {', '.join(reasons)}; torch forms run instead ({path}).")
    return said


def speeds(ops: Iterable[str], device: str) -> Table:
    """Milliseconds of every case of the ops, and how many times the memory floor that is."""
    chosen, place = set(ops), torch.device(device)
    rate = copy_rate(place)
    title = f"Speed at {TIMED}, bfloat16, and times the memory floor (copies at {rate / 1e12:.2f} TB/s)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for heading in ("forward ms", "over floor", "forward + backward ms", "over floor"):
        table.add_column(heading, justify="right")
    for case in CASES:
        if case.op not in chosen:
            continue
        try:
            example = case.example(TIMED, torch.bfloat16, place)
            tensors = trainable(example.inputs, case.constants)
            with backend("triton"):
                figures, out = measure(lambda x, e=example: e._replace(inputs=x).call()[0], tensors, rounds=1)
        except torch.OutOfMemoryError:
            table.add_row(case.name, "not enough GPU memory")
            continue
        least = floor(tensors, out, rate)
        over = figures.forward_ms / least.forward_ms, figures.train_ms / least.train_ms
        table.add_row(
            case.name, f"{figures.forward_ms:.3f}", f"{over[0]:.1f}x", f"{figures.train_ms:.3f}", f"{over[1]:.1f}x"
        )
    return table
