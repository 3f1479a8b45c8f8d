"""Text to tokens and back: bytes by default, or a Hugging Face tokenizer from a folder or file."""

import sys
from codecs import getincrementaldecoder
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from subquad.errors import UserError

HF_FILE = "tokenizer.json"


@runtime_checkable
class Tokenizer(Protocol):
    kind: str  # what config.json records: "bytes" or "huggingface"
    vocab_size: int
    eos_id: int | None

    def encode(self, text: str | bytes) -> list[int]:
        """Tokens of a text, with nothing added."""

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """The UTF-8 bytes of tokens; they may end within a character."""

    def decoder(self, before: list[int]) -> Callable[[int | None], str]:
        """Tokens to text one at a time, after the tokens `before`: each call gives the characters a token completes;
        None gives the rest."""

    def save(self, folder: Path) -> None:
        """Put what `load_tokenizer` needs beside a model."""


class ByteTokenizer:
    """Every byte is a token; any file is valid input."""

    kind, vocab_size = "bytes", 256
    eos_id: int | None = None

    def encode(self, text: str | bytes) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return bytes(t for t in tokens if t < 256)

    def decoder(self, before: list[int]) -> Callable[[int | None], str]:
        utf8 = getincrementaldecoder("utf-8")("replace")
        return lambda token: utf8.decode(b"" if token is None else self.decode_bytes([token]), final=token is None)

    def save(self, folder: Path) -> None:
        pass


class HFTokenizer:
    """A tokenizer.json, alone or in the folder of a Hugging Face model."""

    kind = "huggingface"

    def __init__(self, path: str | Path, trust_code: bool = False):
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
        except Exception as error:  # the libraries raise bare Exceptions for malformed files
            raise UserError(f"{path} holds no tokenizer that loads: {' '.join(str(error).split())}") from error
        self.tokenizer.model_max_length = sys.maxsize  # what its file says may be no number, and is no limit of ours
        self.vocab_size = len(self.tokenizer)
        self.eos_id = self.tokenizer.eos_token_id

    def encode(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"the text is not UTF-8 (byte {error.start}); only the byte tokenizer takes any bytes"
                ) from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False).encode()

    def decoder(self, before: list[int]) -> Callable[[int | None], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(ids=before, skip_special_tokens=False)
        held: list[int] = []

        def push(token: int | None) -> str:
            if token is None:
                return self.decode_bytes(held).decode() if held else ""
            held.append(token)
            piece = stream.step(self.tokenizer.backend_tokenizer, token)
            if piece is not None:
                held.clear()
            return piece or ""

        return push

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(str(folder))


def load_tokenizer(spec: str | Path = "bytes", *, trust_code: bool = False) -> Tokenizer:
    """'bytes', a tokenizer.json, a Hugging Face folder, or the folder of a model saved by subquad.

    trust_code: run the Python code that a Hugging Face folder may hold; else that is an error.
    """
    if spec == "bytes":
        return ByteTokenizer()
    folder = Path(spec)
    if (folder / "config.json").is_file():
        from subquad.reading import read_mapping

        values = read_mapping(folder / "config.json")
        if values.get("format") == "subquad" and values.get("tokenizer") == "bytes":
            return ByteTokenizer()
    return HFTokenizer(folder, trust_code)
