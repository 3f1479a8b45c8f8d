"""`subquad doctor`: what is installed, what runs where, and whether every op computes what its definition says."""

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from math import inf, isnan

import torch
from rich.console import Console
from rich.table import Table

import subquad
from subquad.arguments import Parser
from subquad.compare import gpu_check
from subquad.kernels.backend import INTERPRETED, TRITON, current_backend
from subquad.kernels.blocked import triton_version
from subquad.kernels.examples import differences, examples, load_ops

PACKAGES = ("torch", "triton", "transformers", "lightning")
TOLERANCE = 1e-10  # in float64, where the forms differ only by the order of summation


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 1 if an op is wrong somewhere."""
    Parser(prog="subquad doctor", description=__doc__).parse_args(argv)
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    devices = [device for device, there in present.items() if there]
    console = Console()
    console.print(_environment(devices))
    fused = [op for op, forms in load_ops().items() if "triton" in forms]
    gpus = _gpus() if present["cuda"] and TRITON and fused else {}
    running = {gpu: gpu_check.Running(fused, gpu) for gpu in gpus}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # short rows need no more, and the checks of Triton forms want the processors
    table, failures = _self_check(devices)
    torch.set_num_threads(threads)
    console.print(table)
    for gpu, name in gpus.items():
        failures += _report_gpu(console, running[gpu].outcomes(), gpu, name, fused)
    if INTERPRETED and not gpus:
        outcomes = [gpu_check.run(check) for check in gpu_check.checks(fused, "cpu")]
        table, _, wrong = gpu_check.verdicts(outcomes, "Triton forms under the interpreter, against float64", "FAIL")
        console.print(table)
        failures += wrong
    if failures:
        console.print(*failures, sep="\n", markup=False)
        console.print("Do not trust the results of these ops on these devices.")
        return 1
    console.print("Every op agrees with its definition.")
    return 0


def _gpus() -> dict[str, str]:
    """The first GPU of each kind, by device: its name."""
    names = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    first = {name: device for device, name in reversed(names.items())}
    return {device: name for device, name in names.items() if first[name] == device}


def _report_gpu(
    console: Console, outcomes: Sequence[gpu_check.Outcome], gpu: str, name: str, fused: Sequence[str]
) -> list[str]:
    """Print what the checks of the Triton forms found and how fast they are, and keep the block list."""
    title = f"Triton forms on {name}: relative error against the naive form in float64"
    table, reasons, lines = gpu_check.verdicts(outcomes, title, "BLOCKED")
    console.print(table)
    for line in gpu_check.keep_list(outcomes, reasons, name, triton_version()):
        console.print(line, soft_wrap=True, markup=False)
    console.print(gpu_check.speeds([op for op in fused if op not in reasons], gpu))
    return lines


def _environment(devices: list[str]) -> Table:
    table = Table(title="Environment", title_justify="left", show_header=False)
    table.add_row("subquad", subquad.__version__)
    table.add_row("python", f"{sys.version.split()[0]} on {platform.platform()}")
    for package in PACKAGES:
        table.add_row(package, _version(package))
    table.add_row("cpu", f"threads: {torch.get_num_threads()}, backend {current_backend('cpu')}")
    for device in devices[1:]:
        count = torch.cuda.device_count() if device == "cuda" else 1
        names = [torch.cuda.get_device_name(i) if device == "cuda" else "Apple GPU" for i in range(count)]
        table.add_row(device, f"{', '.join(names)}, backend {current_backend(device)}")
    if len(devices) == 1:
        table.add_row("GPU", "none that torch can use")
    return table


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _self_check(devices: list[str]) -> tuple[Table, list[str]]:
    """Each op's forms against its naive form in float64: the table, and one line for everything that is off."""
    table = Table(title="Self-check: relative error against the naive form, float64", title_justify="left")
    for heading in ("op", "form", "device", "examples", "worst", "verdict"):
        table.add_column(heading, justify="right" if heading in ("examples", "worst") else "left")
    failures = []
    for op, forms in sorted(load_ops().items()):
        for form, device in _placements(forms, devices):
            found = examples(op, device=device)
            errors = {f"{e.name}: {what}": x for e in found for what, x in differences(e, form).items()}
            wrong = {name: x for name, x in errors.items() if not x < TOLERANCE}  # NaN is not below it either
            worst = max(errors.values(), key=lambda x: inf if isnan(x) else x)
            verdict = "[bold]FAIL[/bold]" if wrong else "PASS"
            table.add_row(op, form, device, str(len(found)), f"{worst:.1e}", verdict)
            failures += [f"{op}, {form} on {device}, {name} is off by {x:.1e}" for name, x in wrong.items()]
    return table, failures


def _placements(forms: Sequence[str], devices: list[str]) -> list[tuple[str, str]]:
    """(form, device) to check. mps has no float64, so nothing is claimed about it; Triton forms do without."""
    chosen = [form for form in forms if form not in ("naive", "triton")]
    return [(form, device) for form in chosen for device in devices if device != "mps"]
