"""Errors that a person can act on."""

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr
from typing import Any


class UserError(ValueError):
    """Bad input, told in one sentence: what was given and what is allowed.

    The commands print it without a traceback and exit with code 2. Whatever stands in it, it is one line and not long.
    """

    def __init__(self, message: str):
        super().__init__(shown_text(message, 1000))


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt `word`: the nearest valid one, or all of them where none is near."""
    choices, word = sorted(valid), word[:100]
    close = get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "allowed: " + ", ".join(choices) if choices else "nothing is allowed here"


def shown(value: Any) -> str:
    """`repr(value)` for a sentence: short whatever the value is, of which numbers of any length and cycles are some."""
    return shown_text(_SHORT.repr(value))


def shown_text(text: str, most: int = 300) -> str:
    """A text for a sentence: without what a terminal could not show, and without its middle where it is long."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 3 :]}"


def one_line(error: Exception) -> str:
    return shown_text(" ".join(str(error).split()), 1000)


class _Short(Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxdict = self.maxlist = self.maxtuple = 8
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**30 else f"a number of {x.bit_length():,} bits"


_SHORT = _Short()
