"""Files a command writes: refused before the work starts where they cannot be written, and never half there."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from subquad.errors import UserError


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """One sentence, before any work, for a file that could not be written after it."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; pass overwrite (--overwrite) to replace it")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def write_atomically(path: str | Path, write: Callable[[Path], object], *, overwrite: bool) -> None:
    """Let `write(partial)` fill a file beside `path` and give it the name only when it is complete."""
    path = check_output(path, overwrite=overwrite)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            write(partial)
            partial.chmod(0o644)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
