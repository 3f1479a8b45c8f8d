"""What `subquad doctor` does on a GPU: every Triton form and shipped configuration against float64, and its speed.

Each check runs in a process of its own, several at a time: compiling is most of the work, and a kernel that writes
where it should not, or never ends, spoils only its own. What is wrong goes to the block list, what is right leaves it.
"""

import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from math import inf, isnan
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from subquad.compare.kernel_cases import CASES, Sizes
from subquad.compare.kernel_timing import copy_rate, floor, measure, trainable
from subquad.compare.kernel_tune import TOLERANCE, errors
from subquad.infer.output import write_atomically
from subquad.kernels import blocked
from subquad.kernels.backend import backend
from subquad.kernels.blocked import Blocked
from subquad.kernels.examples import Example, differences, examples, run_in_place
from subquad.kernels.triton import configs

SETTINGS = {torch.bfloat16: ("fresh", "packed, carried"), torch.float32: ("packed, carried",)}
USUAL = (64, 128)  # head widths checked whatever the table holds
TIMED = Sizes(8, 2048, 16, 128)
VARIANTS = 3  # of an op's examples that a process checks: each is some kernels to compile
LIMIT_S = 300  # of one check
MEMORY = 2**30  # bytes of the GPU that a process is given room for


class Check(NamedTuple):
    """Every `parts`-th variant of an op's examples from number `part` on, or (`case`) one of its cases at all widths
    that the table has entries for."""

    op: str
    case: str | None
    device: str
    part: int = 0
    parts: int = 1


class Outcome(NamedTuple):
    """Errors by dtype and name; why the form did not run; or why nothing can be said."""

    check: Check
    errors: dict[str, dict[str, float]]
    failure: str | None = None
    unknown: str | None = None

    def wrong(self) -> list[str]:
        """What is wrong with the op, as ends of sentences."""
        found = [
            f"{name} is off by {x:.1e} in {dtype}"
            for dtype, named in self.errors.items()
            for name, x in named.items()
            if not x < TOLERANCE[getattr(torch, dtype)]  # NaN is not below it either
        ]
        return found + ([self.failure] if self.failure else [])


def checks(ops: Iterable[str], device: str) -> list[Check]:
    """All there is to check, the longest first."""
    chosen = set(ops)
    found = [Check(case.op, case.name, device) for case in CASES if case.op in chosen]
    for op in sorted(chosen):
        parts = -(-_variants(examples(op, time=2)) // VARIANTS)
        found += [Check(op, None, device, part, parts) for part in range(parts)]
    return found


def _variants(found: Sequence[Example]) -> int:
    return sum(example.name.endswith(", fresh") for example in found)


def _examples(check: Check, time: int, dtype: torch.dtype) -> list[Example]:
    """Those of this check; each setting has all variants in the same order."""
    found = examples(check.op, time=time, dtype=dtype, device=check.device)
    variants = _variants(found)
    return [e for number, e in enumerate(found) if number % variants % check.parts == check.part]


class Running:
    """Checks in processes of their own, begun when this is made; `outcomes` waits for them."""

    def __init__(self, found: Sequence[Check], device: str):
        free, _ = torch.cuda.mem_get_info(device)
        at_once = max(1, min(len(found), os.cpu_count() or 1, free // MEMORY))
        self.pool = ThreadPoolExecutor(at_once)
        self.futures: list[Future[Outcome]] = [self.pool.submit(isolated, check) for check in found]

    def outcomes(self) -> list[Outcome]:
        with self.pool:
            return [future.result() for future in self.futures]


def isolated(check: Check, limit: float = LIMIT_S) -> Outcome:
    """Run a check in a new process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(check, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        if ours.poll(limit):
            return ours.recv()
        failure = f"{check.case or 'an example'} does not end within {limit:g} s"
    except EOFError:
        child.join()
        failure = f"{check.case or 'an example'} ends its process with code {child.exitcode}"
    finally:
        child.kill()
        child.join()
    return Outcome(check, {}, failure=failure)


def _child(check: Check, pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(run(check))


def run(check: Check) -> Outcome:
    found: dict[str, dict[str, float]] = {}
    name = check.case or "an example"
    try:
        if check.case is None:
            for dtype, settings in SETTINGS.items():
                if check.device == "cpu" and dtype != torch.float32:
                    continue  # the interpreter's bfloat16 is wrong
                time = 20 if check.device == "cpu" else 70  # the interpreter is slow
                for example in _examples(check, time, dtype):
                    name = example.name
                    if any(name.endswith(f", {setting}") for setting in settings):
                        with blocked.ignored():
                            _keep(found, dtype, name, differences(example, "triton"))
                for example in _examples(check, 3, dtype):
                    name = f"{example.name}, in place"
                    if example.state is not None:
                        with blocked.ignored():
                            _keep(found, dtype, name, differences(example, "triton", run_in_place))
        else:
            case = next(case for case in CASES if case.name == check.case)
            capability, kernels = torch.cuda.get_device_capability(check.device), None
            for K, V, dtype in widths(capability):
                if kernels is not None and (K, V, dtype) not in widths(capability, kernels):
                    continue  # entries of kernels that this case does not launch
                name = f"{check.case} at widths {K} and {V}"
                sizes, device = Sizes(1, 1, 2, K, V), torch.device(check.device)
                with configs.recorded() as launched:
                    _keep(found, dtype, name, errors(case, sizes, dtype, device))
                kernels = {kernel for kernel, _ in launched}
    except torch.OutOfMemoryError:
        return Outcome(check, found, unknown=f"{check.op}: not enough GPU memory for {name}")
    except Exception as error:  # a compiler's or a driver's, whatever it is: the form does not run here
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Outcome(check, found, failure=f"{name} does not run ({why})")
    return Outcome(check, found)


def _keep(found: dict[str, dict[str, float]], dtype: torch.dtype, name: str, seen: dict[str, float]) -> None:
    kept = found.setdefault(str(dtype).removeprefix("torch."), {})
    kept |= {f"{name}: {what}": x for what, x in seen.items()}


def widths(capability: tuple[int, int], kernels: Iterable[str] | None = None) -> list[tuple[int, int, torch.dtype]]:
    """(K, V, dtype) that between them use every entry for this GPU, of these kernels or of all."""
    found = {(width, width, torch.bfloat16): None for width in USUAL}
    table = configs.table()
    for kernel in table if kernels is None else kernels:
        for entry in table[kernel].entries:
            if entry.capability == capability and "K" in entry.widths:
                dtype = torch.float32 if entry.widths.get("size") == 4 else torch.bfloat16
                found[entry.widths["K"], entry.widths.get("V", entry.widths["K"]), dtype] = None
    return list(found)


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
        for dtype in ("float32", "bfloat16"):
            seen = [x for outcome in mine for x in outcome.errors.get(dtype, {}).values()]
            worst.append(f"{max(seen, key=lambda x: inf if isnan(x) else x):.1e}" if seen else "-")
        count = sum(len(named) for outcome in mine for named in outcome.errors.values())
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
                figures, out = measure(lambda x, e=example: e._replace(inputs=x).call()[0], tensors)
        except torch.OutOfMemoryError:
            table.add_row(case.name, "not enough GPU memory")
            continue
        least = floor(tensors, out, rate)
        over = figures.forward_ms / least.forward_ms, figures.train_ms / least.train_ms
        table.add_row(
            case.name, f"{figures.forward_ms:.3f}", f"{over[0]:.1f}x", f"{figures.train_ms:.3f}", f"{over[1]:.1f}x"
        )
    return table
