"""What the `infer` command does."""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

from subquad import terminal
from subquad.errors import UserError
from subquad.files import check_output, write_atomically
from subquad.infer.device import PeakMemory, pick_device, pick_dtype
from subquad.infer.generate import Context, Generation, check_counts, encode
from subquad.infer.progress import Progress
from subquad.infer.sampling import Sampling, generator, seeds_from
from subquad.infer.state import nbytes
from subquad.infer.text import stop_strings
from subquad.kernels.backend import current_backend
from subquad.layers.base import dtype_of
from subquad.models.checkpoint import load
from subquad.models.lm import LM
from subquad.models.tokenizer import load_tokenizer


def run(options: argparse.Namespace) -> int:
    """Check everything that can be checked, then load, read and generate."""
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    check_counts(sampling, options.max_new_tokens, options.num_samples, options.prefill_chunk)
    stop, dtype, device = stop_strings(options.stop), pick_dtype(options.dtype), pick_device(options.device)
    seeds = seeds_from(options.seed, options.num_samples)
    for path in (options.save_state, options.stats):
        if path is not None:
            check_output(path, overwrite=options.overwrite)
    prompt = read_prompt(options)
    model = load(options.model, device=device, dtype=dtype, trust_code=options.trust_code)
    tokenizer = load_tokenizer(options.model, trust_code=options.trust_code, special_tokens=options.special_tokens)
    memory = PeakMemory(device)
    tokens = None if prompt is None else encode(tokenizer, prompt, model.config.vocab_size)
    del prompt
    context = start(options, model, tokens, seeds)

    stats: dict[str, Any] = {"model": str(options.model), "device": str(device), "dtype": model_dtype(model)}
    stats |= {"backend": current_backend(device.type), "seed": seeds[0]}
    with interruptible() as interrupted:
        n_unread = sum(len(u) for u in context.unread)
        began = perf_counter()
        with Progress("reading", n_unread - len(context.unread)) as progress:
            for count in context.read(options.prefill_chunk):
                progress.advance(count)
                if interrupted():
                    break
        stats |= speed("prefill", n_unread - sum(len(u) for u in context.unread), perf_counter() - began)
        if options.num_samples > 1 and not interrupted():
            context = context.fork(options.num_samples, seeds)
        generation = Generation(
            context,
            tokenizer,
            sampling,
            max_new_tokens=0 if interrupted() else options.max_new_tokens,
            stop=stop,
            park=options.save_state is not None,
        )
        began = perf_counter()
        printer = Printer(len(context.unread))
        for i, piece in generation:
            printer.say(i, piece)
            if interrupted() or terminal.failure():
                break
        stats |= speed("decode", sum(len(t) for t in generation.tokens), perf_counter() - began)
        stats |= {"sequences": len(context.unread), "state_bytes": nbytes(context.state)}
        stats |= {"peak_memory_bytes": memory.above(), "peak_memory_source": memory.source}
        # What is kept comes before what is shown, and a signal that arrives now waits for it.
        if options.save_state is not None:
            context.save(options.save_state, overwrite=options.overwrite)
        held = list(generation.finish())
        stats |= {"interrupted": bool(interrupted()), "texts": generation.texts}
        if options.stats is not None:
            text = json.dumps(stats, indent=2) + "\n"
            write_atomically(options.stats, lambda partial: partial.write_text(text), overwrite=options.overwrite)
        for i, piece in held:
            printer.say(i, piece)
        printer.finish()
        signal_number = interrupted()
    if options.save_state is not None:
        print(f"the state is in {options.save_state}", file=sys.stderr)
    if signal_number:
        generated = sum(len(t) for t in generation.tokens)
        print(f"interrupted after {sum(context.lengths)} tokens read and {generated} generated", file=sys.stderr)
        return 128 + signal_number
    if generation.broken:
        raise UserError(generation.broken)
    return 0


def read_prompt(options: argparse.Namespace) -> str | bytes | None:
    """The prompt from wherever it was given; None where a state goes on without one."""
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt and --prompt-file were both given; give one")
    if options.prompt is not None:
        return options.prompt
    if options.prompt_file is not None:
        try:
            return Path(options.prompt_file).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the prompt file {options.prompt_file}: {error.strerror}") from error
    if options.load_state is not None:
        return None
    if sys.stdin.isatty():
        raise UserError("there is no prompt; give --prompt TEXT, --prompt-file F, or text on stdin")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise UserError(f"cannot read the prompt from stdin: {error.strerror}") from error


def start(options: argparse.Namespace, model: LM, tokens: Any, seeds: list[int]) -> Context:
    """A new context, or the one of a state file, with the seeds that were asked for."""
    if options.load_state is None:
        return Context.start(model, [tokens], seeds[:1], options.max_new_tokens)
    context = Context.load(options.load_state, model, more=tokens, max_new_tokens=options.max_new_tokens)
    if options.seed is not None:
        context.generators = [generator(options.seed + i) for i in range(len(context.unread))]
    if options.num_samples > 1 and len(context.unread) > 1:
        raise UserError(f"{options.load_state} holds {len(context.unread)} sequences; --num-samples forks a single one")
    return context


def model_dtype(model: LM) -> str:
    return str(dtype_of(model)).removeprefix("torch.")


def speed(what: str, tokens: int, seconds: float) -> dict[str, Any]:
    rate = round(tokens / seconds, 1) if tokens else None
    return {f"{what}_tokens": tokens, f"{what}_seconds": round(seconds, 4), f"{what}_tokens_per_second": rate}


@contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """Make the first SIGINT (Ctrl-C), SIGTERM or SIGHUP a question that the loops ask between two steps: its number, or
    0. A second one ends the process as usual.

    In the middle of a step the state is half written, so an exception there would leave nothing to save. A signal that
    was ignored from outside, as nohup does, stays so.
    """
    asked = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        asked = asked or number

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Printer:
    """Text on stdout as it comes. Of several texts one is shown at a time, under a heading, the others wait."""

    def __init__(self, n: int):
        self.waiting: list[list[str]] = [[] for _ in range(n)]
        if n > 1:
            print("==> 1 <==", flush=True)

    def say(self, i: int, piece: str) -> None:
        if i == 0:
            sys.stdout.write(piece)
            sys.stdout.flush()
        else:
            self.waiting[i].append(piece)

    def finish(self) -> None:
        """Show what waits."""
        for i, pieces in enumerate(self.waiting[1:], 2):
            print(f"\n==> {i} <==\n" + "".join(pieces), end="")
        if sys.stdout.isatty() or len(self.waiting) > 1:
            print()
        sys.stdout.flush()
