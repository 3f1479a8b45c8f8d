"""Text on disk to documents, a split and memory-mapped tokens.

A document is a file, or a range of one. Files are sorted, and files with the same content count once. What is
validation and what is training follows from the content alone, so it is the same on every machine with the same text.
"""

import glob
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from subquad.errors import UserError
from subquad.folders import cache_folder
from subquad.models.tokenizer import Tokenizer

FORMAT = 1  # part of every cache key: raise it when the files' meaning changes
FEWEST_FILES = 20  # below this a split by file would rest on a handful of texts
NOT_TEXT_WORTH_LEARNING = {
    *("test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"),
    *("site-packages", "dist-packages", "__pycache__", "__phello__"),
}


@dataclass(frozen=True)
class TextFile:
    path: Path
    digest: str  # SHA-256 of its bytes
    size: int  # bytes


@dataclass(frozen=True)
class Document:
    """Bytes start..stop-1 of a file."""

    file: TextFile
    start: int
    stop: int

    def read(self) -> bytes:
        with open(self.file.path, "rb") as handle:
            handle.seek(self.start)
            return handle.read(self.stop - self.start)


@dataclass(frozen=True)
class Tokens:
    """The tokens of some documents, one after the other.

    tokens: memory-mapped unsigned integers; document i is tokens[starts[i] : starts[i + 1]].
    n_bytes: bytes of text they stand for.
    """

    tokens: np.ndarray
    starts: np.ndarray
    n_bytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / max(len(self.tokens), 1)


def standard_library() -> list[Path]:
    """Python's own library source: real text on every machine that runs this, without tests and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in NOT_TEXT_WORTH_LEARNING]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


def expand(patterns: str | Sequence[str], option: str) -> list[Path]:
    """The files that paths and globs (with ** for any depth) name; a pattern that names none is an error."""
    paths: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [Path(pattern)] if Path(pattern).exists() else [Path(p) for p in glob.glob(pattern, recursive=True)]
        if [p for p in found if p.is_dir()] == found and found:
            raise UserError(
                f"{option}: {pattern} is a folder; give its files, such as '{pattern.rstrip('/')}/**/*.txt'"
            )
        files = [p for p in found if p.is_file()]
        if not files:
            raise UserError(f"{option}: no file matches {pattern!r}")
        paths += files
    return sorted(set(paths))


def read_files(paths: Iterable[Path]) -> list[TextFile]:
    """Sizes and digests; empty files and second copies are left out."""
    files: dict[str, TextFile] = {}
    for path in paths:
        try:
            with open(path, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
                size = handle.tell()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if size:
            files.setdefault(digest, TextFile(path, digest, size))
    return list(files.values())


def split(files: Sequence[TextFile], fraction: float) -> tuple[list[Document], list[Document]]:
    """Documents to train on and to validate on.

    From 20 files on the split is by file: in the order of their digests, files go to validation until `fraction` of all
    bytes is there; none of them makes up more than a tenth of it. Of fewer files, the end of each is validation.
    """
    total = sum(f.size for f in files)
    wanted = int(fraction * total)
    if len(files) < FEWEST_FILES:
        cuts = [(f, _cut_near(f, f.size - max(1, int(fraction * f.size)))) for f in files]
        return [Document(f, 0, cut) for f, cut in cuts if cut], [Document(f, cut, f.size) for f, cut in cuts]
    chosen: set[str] = set()
    taken = 0
    for file in sorted(files, key=lambda f: f.digest):
        if taken < wanted and file.size * 10 <= wanted:
            chosen.add(file.digest)
            taken += file.size
    whole = [Document(f, 0, f.size) for f in files]
    return [d for d in whole if d.file.digest not in chosen], [d for d in whole if d.file.digest in chosen]


def _cut_near(file: TextFile, offset: int) -> int:
    """Just after the last line that ends before `offset`, or where no line does, at the start of a UTF-8 character."""
    window = Document(file, max(0, offset - 65536), offset).read()
    newline = window.rfind(b"\n")
    if newline >= 0:
        return offset - len(window) + newline + 1
    after = Document(file, offset, min(file.size, offset + 4)).read()
    return offset + next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), 0)


def gzip_bits_per_byte(documents: Iterable[Document]) -> float:
    """Of `gzip -9` on the documents' text, one after the other: what a model should at least come near."""
    packer, packed, n_bytes = zlib.compressobj(9, wbits=31), 0, 0
    for document in documents:
        text = document.read()
        packed += len(packer.compress(text))
        n_bytes += len(text)
    return 8 * (packed + len(packer.flush())) / max(n_bytes, 1)


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, cache: str | Path | None = None) -> Tokens:
    """The documents' tokens, from the cache if they are there, else made and put there.

    A tokenizer with an end-of-text token puts one after each document. The cache's key is the text and the tokenizer.
    """
    folder = Path(cache) if cache is not None else cache_folder()
    folder = folder / "tokens" / _key(documents, tokenizer)
    if not folder.exists():
        try:
            _write(folder, documents, tokenizer)
        except OSError as error:
            raise UserError(f"cannot write the token cache {folder.parent}: {error.strerror or error}") from error
    return _open(folder)


def _key(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.kind} {tokenizer.vocab_size} {tokenizer.eos_id}".encode())
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save(Path(saved))
        for path in sorted(Path(saved).rglob("*")):
            if path.is_file():
                digest.update(path.read_bytes())
    for document in documents:
        digest.update(f"{document.file.digest} {document.start} {document.stop}\n".encode())
    return digest.hexdigest()[:32]


def _write(folder: Path, documents: Sequence[Document], tokenizer: Tokenizer) -> None:
    """Fill a folder beside `folder` and rename it: a reader sees all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    dtype = np.dtype(np.min_scalar_type(tokenizer.vocab_size - 1)).newbyteorder("<")
    starts, n_bytes = [0], 0
    try:
        with open(partial / "tokens.bin", "wb") as out:
            for document in documents:
                ids = _encode(document, tokenizer, dtype)
                ids.tofile(out)
                starts.append(starts[-1] + len(ids))
                n_bytes += document.stop - document.start
        np.save(partial / "starts.npy", np.asarray(starts, np.int64))
        meta = {"dtype": dtype.str, "n_bytes": n_bytes}
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _encode(document: Document, tokenizer: Tokenizer, dtype: np.dtype) -> np.ndarray:
    text = document.read()
    if tokenizer.kind == "bytes":  # a list of Python integers would take eight times the file
        return np.frombuffer(text, np.uint8)
    try:
        ids = tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{document.file.path}: {error}") from error
    return np.asarray(ids if tokenizer.eos_id is None else [*ids, tokenizer.eos_id], dtype)


def _open(folder: Path) -> Tokens:
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        starts = np.load(folder / "starts.npy")
        tokens = np.memmap(folder / "tokens.bin", meta["dtype"], "r") if starts[-1] else np.zeros(0, meta["dtype"])
        if len(tokens) != starts[-1]:
            raise ValueError(f"tokens.bin holds {len(tokens)} tokens, starts.npy says {starts[-1]}")
        return Tokens(tokens, starts, meta["n_bytes"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the token cache {folder} is damaged ({error}); delete that folder") from error
