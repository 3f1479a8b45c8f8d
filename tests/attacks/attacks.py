"""Attacks with damaged and hostile input: each ends well or with one sentence, quickly and without much memory.

A case is (kind, number) and follows from the two alone. Cases run in forked children of one process that has imported
and used everything before, so that their time and memory are their own.

    python tests/attacks/attacks.py --count 100                     of every kind
    python tests/attacks/attacks.py --kinds weights --first 17 --count 1 --show
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, BYTES = 5.0, 2**30
PER_CHILD = 40
WORKS, REFUSED, BAD = "works", "refused", "bad"


@dataclass
class Kind:
    """One kind of input. make(draw) writes the attack into the current folder and returns how to use it.

    share: of all cases.
    """

    make: Callable[[random.Random], Callable[[], Any]]
    share: float


def attack(kind: Kind, name: str, number: int) -> tuple[str, str]:
    """(verdict, what it said) of one case, in this process."""
    from subquad.errors import UserError, one_line
    from subquad.memory import ran_out

    use = kind.make(random.Random(f"{name} {number}"))
    reset_peak()
    before, begin = peak(), time.process_time()
    try:
        said = use()
        verdict = WORKS if said is None else REFUSED
    except UserError as error:
        verdict, said = REFUSED, str(error)
    except BaseException as error:
        if not ran_out(error):  # which commands tell in one sentence
            return BAD, traceback.format_exc()
        verdict, said = REFUSED, one_line(error)
    seconds, grown = time.process_time() - begin, peak() - before
    if seconds > SECONDS or grown > BYTES:
        return BAD, f"{seconds:.1f} s, {grown / 2**20:.0f} MiB; {said}"
    if said is not None and ("\n" in said or not said or len(said) > 1500):
        return BAD, f"no sentence: {said!r}"
    return verdict, said or ""


def run_cases(
    kinds: dict[str, Kind], cases: Sequence[tuple[str, int]], folder: Path
) -> list[tuple[str, int, str, str]]:
    """The cases with their verdicts. A child that dies gives its case up and the next child goes on."""
    done: list[tuple[str, int, str, str]] = []
    while len(done) < len(cases):
        batch = cases[len(done) : len(done) + PER_CHILD]
        answers, died = in_a_child(kinds, batch, folder)
        done += [(*case, *answer) for case, answer in zip(batch, answers, strict=False)]
        if len(answers) < len(batch):
            done.append((*batch[len(answers)], BAD, died))
    return done


def in_a_child(kinds: dict[str, Kind], batch: Sequence[tuple[str, int]], folder: Path) -> tuple[list[list[str]], str]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 1
        try:
            limit_this_process(folder)
            for name, number in batch:
                os.chdir(tempfile.mkdtemp(dir=folder))
                signal.setitimer(signal.ITIMER_PROF, 3 * SECONDS)  # what hangs is killed, what is slow is told
                signal.setitimer(signal.ITIMER_REAL, 120)
                answer = attack(kinds[name], name, number)
                os.write(writing, json.dumps(answer).encode() + b"\n")
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answers = [json.loads(line) for line in pipe.read().splitlines()]
    status = os.waitpid(pid, 0)[1]
    return answers, f"the process ended with {os.waitstatus_to_exitcode(status)}"


def limit_this_process(folder: Path) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, taken + BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def command(words: list[str]) -> str | None:
    """Run a command; its one sentence where it refuses, None where it works.

    In this process, or with ATTACK_WITH_PROCESSES=1 as a user does.
    """
    if os.environ.get("ATTACK_WITH_PROCESSES") == "1":
        typed = [word.encode("utf-8", "surrogatepass") for word in words]  # not UTF-8 where it cannot be
        done = subprocess.run([Path(sys.executable).with_name("subquad"), *typed], capture_output=True)
        return sentence(done.returncode, done.stderr.decode())
    from subquad.cli import main

    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            code = main(words)
        except SystemExit as end:  # --help
            code = end.code
    return sentence(code or 0, err.getvalue())


def sentence(code: int | str, err: str) -> str | None:
    """What a command that refuses says last; anything else than 0, 1 (a check failed) and that is a fault."""
    if code in (0, 1) and "Traceback" not in err:
        return None
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    if code != 2 or len(lines) != 1 or "Traceback" in err or not err.endswith(lines[0] + "\n"):
        raise AssertionError(f"exit code {code}: {err}")
    return lines[0].removeprefix("error: ")


def shares(of: dict[str, Kind], count: int) -> list[tuple[str, int]]:
    """`count` cases over the kinds by their shares, at least two of each."""
    total = sum(kind.share for kind in of.values())
    return [(name, n) for name, kind in of.items() for n in range(max(2, round(count * kind.share / total)))]


def prepare(names: list[str] | None) -> tuple[dict[str, Kind], Path]:
    """The kinds, with their valid files used once, so that what loads lazily is loaded; and a folder for attacks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import inputs
    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="attacks-"))
    return inputs.kinds(folder / "valid", names), folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+")
    parser.add_argument("--first", type=int, help="number of the first case")
    parser.add_argument("--count", type=int, default=100, help="of all together; of each with --first")
    parser.add_argument("--show", action="store_true", help="every case with what it said")
    given = parser.parse_args()
    every, folder = prepare(given.kinds)
    if given.first is not None:
        cases = [(name, n) for name in every for n in range(given.first, given.first + given.count)]
    else:
        cases = shares(every, given.count)
    begin = time.process_time()
    done = run_cases(every, cases, folder)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    table = {name: Counter(d[2] for d in done if d[0] == name) for name in dict.fromkeys(d[0] for d in done)}
    for name, number, verdict, said in done:
        if given.show or verdict == BAD:
            print(f"--- {verdict}: {name} {number}: {said}")
    for name, counts in table.items():
        print(json.dumps({"kind": name, **counts}))
    seconds = time.process_time() - begin + used.ru_utime + used.ru_stime
    print(json.dumps({"cases": len(done), "cpu_seconds": round(seconds), **Counter(d[2] for d in done)}))
    return int(any(d[2] == BAD for d in done))


if __name__ == "__main__":
    sys.exit(main())
