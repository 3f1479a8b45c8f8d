"""Text to tokens and back: bytes by default, or a Hugging Face tokenizer from a folder or file."""

import json
import re
import sys
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from subquad.errors import UserError
from subquad.reading import read_mapping

CONTEXT = 256  # tokens before a text that its decoding may depend on; a run of byte tokens is the longest
LOOK_BACK = 8  # tokens that are decoded again where no anchor is known
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
END_TOKENS = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|eos|>"),
    *("[EOS]", "<end_of_turn>", "<\uff5cend▁of▁sentence\uff5c>", "<|return|>"),
)


@runtime_checkable
class Tokenizer(Protocol):
    kind: str  # what config.json records: "bytes" or "huggingface"
    vocab_size: int  # above every token
    eos_id: int | None
    special_tokens: bool  # whether a text that spells a special token becomes it

    def encode(self, text: str | bytes) -> list[int]:
        """Tokens of a text, with nothing added."""

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """The UTF-8 bytes of tokens; they may end within a character."""

    def decoder(self, before: list[int]) -> Callable[[int | None], str]:
        """Tokens to text one at a time, after the last `CONTEXT` tokens (or all, if fewer): each call gives what a
        token makes certain, None the rest.

        All of it is what the decoding of everything adds to the whole characters of `before`: a character that
        `before` begins is given with the token that completes it. A token that is not in the vocabulary is no text.
        """

    def save(self, folder: Path) -> None:
        """Put what `load_tokenizer` needs beside a model."""


class ByteTokenizer:
    """Every byte is a token; any file is valid input."""

    kind, vocab_size = "bytes", 256
    eos_id: int | None = None
    special_tokens = False

    def encode(self, text: str | bytes) -> list[int]:
        return list(_utf8(text))

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return bytes(t for t in tokens if t < 256)

    def decoder(self, before: list[int]) -> Callable[[int | None], str]:
        utf8 = getincrementaldecoder("utf-8")("replace")
        utf8.decode(self.decode_bytes(before))
        return lambda token: utf8.decode(b"" if token is None else self.decode_bytes([token]), final=token is None)

    def save(self, folder: Path) -> None:
        pass


class HFTokenizer:
    """A tokenizer.json, alone or in the folder of a Hugging Face model.

    Nothing is added to a text, no beginning-of-text token either; where a model wants one, the prompt spells it and
    `special_tokens` is on. By default a text that spells a special token is read as plain text.

    The end-of-text token is the one that `eos` names, else the one that tokenizer_config.json, special_tokens_map.json,
    generation_config.json or config.json beside the tokenizer names, else the first of `END_TOKENS` among its special
    tokens, else there is none.
    """

    kind = "huggingface"

    def __init__(
        self, path: str | Path, trust_code: bool = False, *, eos: str | None = None, special_tokens: bool = False
    ):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        path = Path(path)
        if not path.exists():
            raise UserError(
                f"there is no tokenizer at {path}; give 'bytes', a tokenizer.json or a folder that holds one"
            )
        try:
            if path.is_file():
                self.tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
            else:
                self.tokenizer = AutoTokenizer.from_pretrained(
                    str(path), local_files_only=True, trust_remote_code=trust_code
                )
            self.backend: Any = self.tokenizer.backend_tokenizer
            self.backend.no_truncation()
            self.backend.no_padding()
            self._name_eos(path if path.is_dir() else path.parent, eos)
            self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except (
            BaseException
        ) as error:  # of malformed files: bare Exceptions, and the Rust part's panics, which are none
            raise UserError(f"{path} holds no tokenizer that loads: {' '.join(str(error).split())}") from error
        self.tokenizer.model_max_length = sys.maxsize  # what its file says may be no number, and is no limit of ours
        if not self.vocab_size:
            raise UserError(f"{path} holds a tokenizer without a token")
        self.special_tokens = special_tokens
        self.eos_id: int | None = self.tokenizer.eos_token_id

    def encode(self, text: str | bytes) -> list[int]:
        try:
            plain = _utf8(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"the text is not UTF-8 (byte {error.start}); only the byte tokenizer takes any bytes"
            ) from error
        self.backend.encode_special_tokens = not self.special_tokens  # transformers resets it at each call of its own
        try:
            return self.backend.encode(plain, add_special_tokens=False).ids
        except Exception as error:  # such as a model that lacks its unknown token
            raise UserError(f"the tokenizer cannot encode the text: {' '.join(str(error).split())}") from error

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return self.decode([t for t in tokens if self.spelling(t) is not None]).encode()

    def decoder(self, before: list[int]) -> Callable[[int | None], str]:
        if self._decoders == ["ByteLevel"]:
            return ByteLevelStream(self, before)
        return WindowStream(self, before)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(str(folder))

    def spelling(self, token: int) -> str | None:
        """A token as the vocabulary writes it; None for one that is not there, which is no text."""
        return self.backend.id_to_token(token) if 0 <= token < self.vocab_size else None

    def decode(self, tokens: list[int]) -> str:
        return self.backend.decode(tokens, skip_special_tokens=False)

    @cached_property
    def _decoders(self) -> list[str]:
        """The types of the steps from tokens to text, in order."""
        step = self.backend.decoder
        values = json.loads(step.__getstate__()) if step is not None else {"type": "none"}
        return [v["type"] for v in values.get("decoders", [values])]

    @cached_property
    def joins_bytes(self) -> bool:
        """Whether what one token is depends on a whole run of tokens for single bytes."""
        return "ByteFallback" in self._decoders

    @cached_property
    def anchor(self) -> list[int]:
        """A token of letters to put before a window, so that its first token is not taken for the first of a text."""
        for token in sorted(self.backend.get_vocab().values()):  # not a range: ids may lie far apart
            word = self.spelling(token)
            if word and word.isascii() and word.isalpha():
                once, twice = self.decode([token]), self.decode([token, token])
                if once and twice.startswith(once) and twice != once:
                    return [token]
        return []

    def _name_eos(self, folder: Path, eos: str | None) -> None:
        known = self.backend.token_to_id
        if eos is not None:
            if known(eos) is None:
                raise UserError(f"the tokenizer has no token {eos!r} to end a text with")
            self.tokenizer.eos_token = eos
            return
        special = {t.content for t in self.backend.get_added_tokens_decoder().values() if t.special}
        if self.tokenizer.eos_token is None:
            named = [name for name in _named_beside(folder, self.backend.id_to_token) if known(name) is not None]
            found = [*named, *(name for name in END_TOKENS if name in special)]
            if found:
                self.tokenizer.eos_token = found[0]


class ByteLevelStream:
    """Text of tokens that are bytes: characters as they are complete."""

    def __init__(self, tokenizer: HFTokenizer, before: Sequence[int]):
        self.tokenizer = tokenizer
        self.utf8 = getincrementaldecoder("utf-8")("replace")
        for token in before:  # a character of the prompt that is not whole yet comes with the token that completes it
            self(token)

    def __call__(self, token: int | None) -> str:
        if token is None:
            return self.utf8.decode(b"", final=True)
        word = self.tokenizer.spelling(token) or ""
        try:
            data = bytes(_byte_alphabet()[c] for c in word)
        except KeyError:  # as an added token, which stands for itself
            data = word.encode()
        return self.utf8.decode(data)


class WindowStream:
    """Text of tokens by decoding the new ones after one that is already out.

    A run of tokens for single bytes (`<0xE4>`) is text only where all of it is UTF-8, else each of its bytes is U+FFFD:
    it waits until the token that ends it. Tokens are decoded a bounded number of times, so the whole is linear.
    """

    def __init__(self, tokenizer: HFTokenizer, before: Sequence[int]):
        self.tokenizer = tokenizer
        known = [t for t in before if tokenizer.spelling(t) is not None]
        cut = len(known) - self._cut(known)
        self.base, self.new = known[:cut], known[cut:]
        if len(before) >= CONTEXT:  # then it may begin within a text, and within a character
            inside = next((i for i, t in enumerate(self.base) if (self._byte(t) or 0) & 0xC0 != 0x80), 0)
            self.base = [*tokenizer.anchor, *self.base[inside:]]
        self.shown = len(tokenizer.decode(self.base))

    def __call__(self, token: int | None) -> str:
        if token is None:
            return self._release() if self.new else ""
        if self.tokenizer.spelling(token) is None:
            return ""
        self.new.append(token)
        return "" if self._byte(token) is not None else self._release()

    def _release(self) -> str:
        tokens = self.base + self.new
        text = self.tokenizer.decode(tokens)
        piece = text[self.shown :]
        # The first tokens of a text may lose a space; what has text before it does not.
        anchored = self.tokenizer.anchor and (text or len(tokens) > LOOK_BACK)
        self.base = [*self.tokenizer.anchor, tokens[-1]] if anchored else tokens[-LOOK_BACK:]
        self.shown = len(self.tokenizer.decode(self.base))
        self.new = []
        return piece

    def _byte(self, token: int) -> int | None:
        if not self.tokenizer.joins_bytes:
            return None
        found = BYTE_TOKEN.fullmatch(self.tokenizer.spelling(token) or "")
        return int(found[1], 16) if found else None

    def _cut(self, tokens: Sequence[int]) -> int:
        """How many of the last tokens are the beginning of a character."""
        run: list[int] = []
        for token in reversed(tokens[-3:]):
            if (value := self._byte(token)) is None:
                break
            run.insert(0, value)
        utf8 = getincrementaldecoder("utf-8")("replace")
        utf8.decode(bytes(run))
        return len(utf8.getstate()[0])


@cache
def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _utf8(text: str | bytes) -> bytes:
    """A text's bytes, those that Python's command line could not decode as they were."""
    try:
        return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds half a surrogate pair (character {error.start}), which is no text") from error


def _named_beside(folder: Path, spelling: Callable[[int], str | None]) -> Iterator[str]:
    """The end-of-text tokens that a model's files name, the first the one that counts."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        # Not read_mapping: transformers writes int(1e30) for "no limit", which is beyond 64 bits.
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        token = values.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            yield token
        ids = values.get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            if type(i) is int and 0 <= i < 2**32 and (word := spelling(i)) is not None:
                yield word


def load_tokenizer(
    spec: str | Path = "bytes", *, trust_code: bool = False, eos: str | None = None, special_tokens: bool = False
) -> Tokenizer:
    """'bytes', a tokenizer.json, a Hugging Face folder, or the folder of a model saved by subquad.

    trust_code: run the Python code that a Hugging Face folder may hold; else that is an error.
    eos: the token that ends a text, where the tokenizer's files name another or none.
    special_tokens: let a text that spells a special token become it; else it is plain text.
    """
    if spec != "bytes":
        folder = Path(spec)
        if not (folder / "config.json").is_file():
            return HFTokenizer(folder, trust_code, eos=eos, special_tokens=special_tokens)
        values = read_mapping(folder / "config.json")
        if values.get("format") != "subquad" or values.get("tokenizer") != "bytes":
            return HFTokenizer(folder, trust_code, eos=eos, special_tokens=special_tokens)
    if eos is not None:
        raise UserError(f"the byte tokenizer has no token {eos!r} to end a text with")
    return ByteTokenizer()
