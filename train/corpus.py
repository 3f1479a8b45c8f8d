"""Text on disk to documents, a split and memory-mapped tokens.

A document is a file, or a range of one. Files are sorted, and files with the same content count once. What is
validation and what is training follows from the content alone, so it is the same on every machine with the same text.
A file that changes between being split and being read is noticed.
"""

import glob
import hashlib
import json
import os
import sysconfig
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from subquad.errors import UserError
from subquad.files import write_folder
from subquad.folders import cache_folder
from subquad.models.tokenizer import Tokenizer
from subquad.reading import read_mapping

FORMAT = 1  # part of every cache key: raise it when the files' meaning changes
DTYPES = ("|u1", "<u2", "<u4", "<u8")  # of tokens.bin
FEWEST_FILES = 20  # below this a split by file would rest on a handful of texts
SHORTEST_END = 64  # bytes: what is cut off a file to validate on is at least about a line
NOT_TEXT_WORTH_LEARNING = {
    *("test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"),
    *("site-packages", "dist-packages", "__pycache__", "__phello__"),
}


@dataclass(frozen=True)
class TextFile:
    path: Path
    digest: str  # SHA-256 of its bytes
    size: int  # bytes
    modified: int = field(compare=False)  # ns, when it was digested


@dataclass(frozen=True)
class Document:
    """Bytes start..stop-1 of a file."""

    file: TextFile
    start: int
    stop: int

    def read(self) -> bytes:
        path = self.file.path
        try:
            with open(path, "rb") as handle:
                status = os.fstat(handle.fileno())
                if (status.st_size, status.st_mtime_ns) != (self.file.size, self.file.modified):
                    raise UserError(f"{path} changed while it was read; start again when it is whole")
                handle.seek(self.start)
                return handle.read(self.stop - self.start)
        except OSError as error:
            raise _unreadable(path, error) from error


@dataclass(frozen=True)
class Tokens:
    """The tokens of some documents, one after the other.

    tokens: memory-mapped unsigned integers; document i is tokens[starts[i] : starts[i + 1]].
    n_bytes: bytes of text they stand for. digest: checksums of the three.
    """

    tokens: np.ndarray
    starts: np.ndarray
    n_bytes: int
    digest: str = ""

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / max(len(self.tokens), 1)

    @property
    def n_targets(self) -> int:
        """Tokens that can be predicted: all but the first of each document."""
        return len(self.tokens) - int(np.count_nonzero(np.diff(self.starts)))


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
        try:
            found = [Path(pattern)] if Path(pattern).exists() else [Path(p) for p in _glob(pattern)]
            if [p for p in found if p.is_dir()] == found and found:
                raise UserError(
                    f"{option}: {pattern} is a folder; give its files, such as '{pattern.rstrip('/')}/**/*.txt'"
                )
            files = [p for p in found if p.is_file()]
        except OSError as error:
            raise UserError(f"{option}: {_unreadable(Path(pattern), error)}") from error
        if not files:
            raise UserError(f"{option}: no file matches {pattern!r}")
        paths += files
    return sorted(set(paths))


def _glob(pattern: str) -> Iterator[str]:
    """What a pattern names; ** enters folders behind links, but each folder once, so that links may form a loop."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    at = parts.index("**")
    seen: set[str] = set()
    for head in glob.glob(os.path.join(*parts[:at])) if at else [""]:
        for folder, subfolders, _ in os.walk(head or ".", followlinks=True):
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            if (real := os.path.realpath(folder)) in seen:
                subfolders.clear()
                continue
            seen.add(real)
            inside = os.path.relpath(folder) if not head else folder
            yield from _glob(os.path.join(glob.escape(inside), *(parts[at + 1 :] or ("*",))))


def read_files(paths: Iterable[Path]) -> list[TextFile]:
    """Sizes and digests; empty files and second copies are left out."""
    files: dict[str, TextFile] = {}
    for path in paths:
        try:
            with open(path, "rb") as handle:
                modified = os.fstat(handle.fileno()).st_mtime_ns
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
                size = handle.tell()
        except OSError as error:
            raise _unreadable(path, error) from error
        if size:
            files.setdefault(digest, TextFile(path, digest, size, modified))
    return list(files.values())


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path}: {error.strerror or error}")


def split(files: Sequence[TextFile], fraction: float) -> tuple[list[Document], list[Document]]:
    """Documents to train on and to validate on.

    The split is by file where there are at least 20 and those of at most a tenth of the validation text suffice for it:
    in the order of their digests, files go to validation until `fraction` of all bytes is there. Otherwise the end of
    each file is validation; one that is too short for that passes its share on to the next.
    """
    total = sum(f.size for f in files)
    wanted = int(fraction * total)
    order = sorted(files, key=lambda f: f.digest)
    cuts: dict[str, int] = {}  # where a file's validation part begins
    taken = 0
    if len(files) >= FEWEST_FILES:
        for file in order:
            if taken < wanted and file.size * 10 <= wanted:
                cuts[file.digest] = 0
                taken += file.size
    if taken < wanted or not taken:
        cuts = _ends(order, fraction, min(SHORTEST_END, max(1, wanted // 2)))
    train = [Document(f, 0, cuts.get(f.digest, f.size)) for f in files]
    return [d for d in train if d.stop], [Document(d.file, d.stop, d.file.size) for d in train if d.stop < d.file.size]


def _ends(files: Sequence[TextFile], fraction: float, shortest: int) -> dict[str, int]:
    """Where each file's end that is validation begins; what one gives too much or too little, the next makes up."""
    cuts, owed = {}, 0.0
    for file in files:
        owed += fraction * file.size
        if owed >= file.size:
            cuts[file.digest] = 0
        elif owed >= shortest:
            # However much is owed, a part stays to train on.
            cut = _cut_near(file, file.size - min(int(owed), int((1 + fraction) / 2 * file.size)))
            if 0 < cut < file.size:
                cuts[file.digest] = cut
        owed -= file.size - cuts.get(file.digest, file.size)
    return cuts


def _cut_near(file: TextFile, offset: int) -> int:
    """Where a line begins near `offset`: within half of what lies on the nearer side of it; without one there, where a
    UTF-8 character begins."""
    slack = min(offset, file.size - offset, 1 << 17) // 2
    window = Document(file, offset - slack, offset + slack).read()
    before, after = window.rfind(b"\n", 0, slack), window.find(b"\n", slack)
    if before >= 0:
        return offset - slack + before + 1
    if after >= 0:
        return offset - slack + after + 1
    start = max(0, offset - 3)
    around = Document(file, start, min(file.size, offset + 1)).read()
    return next((start + i for i in range(len(around) - 1, -1, -1) if around[i] & 0xC0 != 0x80), offset)


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
        _write(folder, documents, tokenizer)
    return _open(folder)


def _key(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    reads = "" if tokenizer.kind == "bytes" else f" special_tokens={tokenizer.special_tokens}"
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.kind} {tokenizer.vocab_size} {tokenizer.eos_id}{reads}".encode())
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save(Path(saved))
        for path in sorted(Path(saved).rglob("*")):
            if path.is_file():
                digest.update(path.read_bytes())
    for document in documents:
        digest.update(f"{document.file.digest} {document.start} {document.stop}\n".encode())
    return digest.hexdigest()[:32]


def _write(folder: Path, documents: Sequence[Document], tokenizer: Tokenizer) -> None:
    """Make the folder: a reader sees all of it or nothing."""
    dtype = np.dtype(np.min_scalar_type(tokenizer.vocab_size - 1)).newbyteorder("<")

    def fill(partial: Path) -> None:
        starts, n_bytes = [0], 0
        with open(partial / "tokens.bin", "wb") as out:
            for document in documents:
                ids = _encode(document, tokenizer, dtype)
                ids.tofile(out)
                starts.append(starts[-1] + len(ids))
                n_bytes += document.stop - document.start
        np.save(partial / "starts.npy", np.asarray(starts, np.int64))
        tokens = np.memmap(partial / "tokens.bin", dtype, "r") if starts[-1] else np.zeros(0, dtype)
        digest = _digest(tokens, np.asarray(starts, np.int64), n_bytes)
        meta = {"dtype": dtype.str, "n_bytes": n_bytes, "digest": digest}
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    try:
        write_folder(folder, fill)
    except UserError:
        if not folder.exists():  # else another process was faster, with the same content
            raise


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
    """The tokens in a cache, of which nothing is believed before it is checked."""
    try:
        meta = read_mapping(folder / "meta.json")
        n_bytes, dtype = meta.get("n_bytes"), meta.get("dtype")
        if type(n_bytes) is not int or n_bytes < 0 or dtype not in DTYPES:
            raise ValueError(f"meta.json holds n_bytes {n_bytes!r} and dtype {dtype!r}")
        starts = np.lib.format.open_memmap(folder / "starts.npy", mode="r")
        if starts.dtype != np.int64 or starts.ndim != 1 or not len(starts) or starts[0] or (np.diff(starts) < 0).any():
            raise ValueError("starts.npy holds no growing offsets")
        size = (folder / "tokens.bin").stat().st_size
        if size != starts[-1] * np.dtype(dtype).itemsize:
            raise ValueError(f"tokens.bin has {size} bytes, starts.npy says {starts[-1]} tokens")
        tokens = np.memmap(folder / "tokens.bin", dtype, "r") if size else np.zeros(0, dtype)
        if (folder / "starts.npy").stat().st_size != starts.offset + starts.nbytes:
            raise ValueError("starts.npy holds more than offsets")
        digest = _digest(tokens, starts, n_bytes)
        if meta.get("digest", digest) != digest:  # caches of version 0.1.0 hold none
            raise ValueError(f"its checksums are {digest}, meta.json says {meta['digest']!r}")
    except Exception as error:  # numpy raises all kinds of a malformed header
        raise UserError(f"the token cache {folder} is damaged ({error}); delete that folder") from error
    return Tokens(tokens, np.array(starts), n_bytes, digest)


def _digest(tokens: np.ndarray, starts: np.ndarray, n_bytes: int) -> str:
    return "".join(f"{zlib.crc32(part):08x}" for part in (tokens, starts, f"{tokens.dtype.str} {n_bytes}".encode()))
