"""`subquad compare`: one module a comparison, each with `main(argv)`."""

from collections.abc import Sequence

from subquad.arguments import dispatch

COMMANDS = {
    "complexity": (
        "subquad.compare.complexity",
        "time, memory and state against length, with exponents and crossovers",
    ),
    "recall": ("subquad.compare.recall", "recall, copying and state tracking of small models, against state bytes"),
    "forms": ("subquad.compare.forms", "every layer's vectorised form against its plain recurrence"),
    "models": ("subquad.compare.models", "parameters, FLOPs, state and weights a token of whole models, counted"),
    "decode": ("subquad.compare.decode", "tokens a second and state of whole models against context"),
    "pick": ("subquad.compare.pick", "what fits a memory at a length, and what it takes there"),
    "kernels": ("subquad.compare.kernels", "Triton forms on this GPU, against the memory floor and other libraries"),
    "cpu": ("subquad.compare.cpu", "tokens per CPU second of small models, against transformers"),
    "refresh": ("subquad.compare.refresh", "the README's tables, anew from the shipped measurements"),
}


def main(argv: Sequence[str]) -> int:
    return dispatch("subquad compare", "Measured cost, in one run on this machine.", COMMANDS, argv)
