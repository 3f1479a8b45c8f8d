"""The `subquad` command and its alias `infer`. Each part loads when asked for, so that `--help` starts at once."""

import os
import sys
from collections.abc import Callable, Sequence

import subquad
from subquad import terminal
from subquad.arguments import dispatch
from subquad.errors import UserError, one_line, shown_text

COMMANDS = {
    "train": ("subquad.train.cli", "train a model from a YAML configuration (train fit --config demo.yaml)"),
    "infer": ("subquad.infer.cli", "continue text with a trained model, from a prompt, a file or stdin"),
    "eval": ("subquad.infer.evaluate", "bits per byte of a model on files"),
    "compare": ("subquad.compare.cli", "measured cost of layers and models against length"),
    "layers": ("subquad.compare.catalog", "the layers, or one layer's arguments, defaults and cost"),
    "conformance": ("subquad.compare.conformance", "put a layer, also your own, through the contract's properties"),
    "doctor": ("subquad.compare.doctor", "versions, devices and backends, and a self-check of every op"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `subquad COMMAND ...` and return its exit code.

    0, 1 (a check failed), 2 (bad input, or stdout that cannot be written), 128 and the number of a signal that ended it
    (130 Ctrl-C, 129 SIGHUP, 143 SIGTERM), 141 (the reader of stdout has gone). Files are written in all cases.
    """
    return _guarded(_dispatch, list(sys.argv[1:] if argv is None else argv))


def infer(argv: Sequence[str] | None = None) -> int:
    """The `infer` command: `subquad infer` by its short name."""
    return main(["infer", *(sys.argv[1:] if argv is None else argv)])


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        print(f"subquad {subquad.__version__}")
        return 0
    # Before torch loads OpenMP, whose waiting threads otherwise spin: with two threads on two cores that other
    # processes also use, a training step took five to seven times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    about = "Efficient sequence-model architectures: train them, run them, compare them. --version prints the version."
    return dispatch("subquad", about, COMMANDS, argv)


def _guarded(run: Callable[[list[str]], int], argv: list[str]) -> int:
    terminal.guard()
    try:
        code = run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as error:
        from subquad.memory import ran_out

        if not ran_out(error):
            raise
        print(f"error: there is not enough memory for this: {one_line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {shown_text(str(error.filename))}: {error.strerror}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    unshown = terminal.failure()
    if unshown is None or code:
        return code
    if isinstance(unshown, BrokenPipeError):  # the reader, such as `head`, has enough
        return 141
    print(f"error: cannot write to stdout: {unshown.strerror}", file=sys.stderr)
    return 2
