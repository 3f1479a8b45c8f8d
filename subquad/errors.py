"""Errors that a person can act on."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input, told in one sentence: what was given and what is allowed.

    The commands print it without a traceback and exit with code 2.
    """


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt `word`: the nearest valid one, or all of them where none is near."""
    choices = sorted(valid)
    close = get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "allowed: " + ", ".join(choices) if choices else "nothing is allowed here"
