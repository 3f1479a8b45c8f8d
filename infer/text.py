"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from subquad.errors import UserError
from subquad.models.tokenizer import Tokenizer


class TextStream:
    """The text of one sequence. `push` gives what a token makes certain; `stopped` tells that a stop string came.

    What might be the start of a stop string is held back until it is not.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        self.decode = tokenizer.decoder(list(before))
        self.stop = stop
        self.held = ""
        self.stopped = self.finished = False

    def push(self, token: int) -> str:
        return self._release(self.decode(token))

    def finish(self) -> str:
        """What is still held when no more tokens come; nothing when asked again."""
        if self.stopped or self.finished:
            return ""
        self.finished = True
        text = self._release(self.decode(None)) + self.held
        self.held = ""
        return text

    def _release(self, piece: str) -> str:
        text = self.held + piece
        found = [at for word in self.stop if (at := text.find(word)) >= 0]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        keep = max((_overlap(text, word) for word in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    words = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in words:
        raise UserError("a stop string is empty; it would stop before the first token")
    return words


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that begins `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if word.startswith(text[-n:])), 0)
