"""Files and folders that appear whole or not at all.

What is written lies beside its target under a name that begins with a dot and ends with .partial until it is complete
and on the disk; then it takes the target's name in one step. The name carries host and process, so that what a killed
process left goes with the next write to the same target. Permissions are those that the umask gives.
"""

import ctypes
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from subquad.errors import UserError, shown_text

_PROCESS = secrets.token_hex(4)  # where containers restart, another process has had our number
_HOST = re.sub(r"\W", "-", socket.gethostname())[:40]
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """The file's path, links followed; one sentence, before any work, where it could not be written after it."""
    name = shown_text(str(path))
    if "\0" in str(path):
        raise UserError(f"cannot write {name}: the name holds a NUL character")
    try:
        path = Path(os.path.realpath(path))  # a link stays one
        if path.is_dir():
            raise UserError(f"{name} is a folder; give a file to write")
        if path.exists():
            if not path.is_file():
                raise UserError(f"{name} is no regular file; give a file to write")
            if not overwrite:
                raise UserError(f"{name} exists; pass overwrite (--overwrite) to replace it")
        if not path.parent.is_dir():
            raise UserError(f"cannot write {name}: there is no folder {shown_text(os.path.dirname(name) or '.')}")
        with suppress(FileNotFoundError):
            os.lstat(path)  # a name that is too long is told here
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror}") from error
    return path


def write_atomically(path: str | Path, write: Callable[[Path], object], *, overwrite: bool) -> None:
    """Let `write(partial)` fill a file beside `path`, which takes that name when it is complete and on the disk.

    Without `overwrite` a file that appeared meanwhile is left alone, and UserError says so.
    """
    path = check_output(path, overwrite=overwrite)
    try:
        sweep(path.parent, _literal(path))
        partial = _beside(path, "partial")
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = partial.stat().st_mode & 0o777
        try:
            write(partial)
            partial.chmod(mode)  # some libraries make the file anew
            _to_disk(partial)
            if overwrite:
                os.replace(partial, path)
            else:
                _rename_to_new(partial, path)
            _to_disk(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def write_folder(path: str | Path, fill: Callable[[Path], object], *, replace: bool = False) -> None:
    """Let `fill(partial)` fill a folder beside `path`, which takes that name when all of it is on the disk.

    With `replace` it takes the place of a folder that is there, in one step where the system has one; where it has not,
    a process that is killed between two leaves the old folder under a name that `recover` knows. Without it, what
    appeared meanwhile is left alone, and UserError says so.
    """
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        sweep(path.parent, _literal(path))
        partial = _beside(path, "partial")
        partial.mkdir()
        try:
            fill(partial)
            mode = partial.stat().st_mode & 0o777
            for place, _, names in os.walk(partial):
                for name in names:
                    os.chmod(Path(place, name), mode & 0o666)  # some libraries make files for their owner alone
                    _to_disk(Path(place, name))
                _to_disk(Path(place))
            if replace and path.exists():
                _exchange(partial, path)
            else:
                _rename_to_new(partial, path)
            _to_disk(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def recover(path: str | Path) -> None:
    """Give a folder its name back where a process was killed while it replaced it."""
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        return
    for old in sorted(path.parent.glob(f".{_literal(path)}.{_HOST}.*.*.old")):
        if _abandoned(old):
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                with suppress(OSError):  # another process was faster
                    os.rename(old, path)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what processes of this host that were killed had begun to write in `folder`, to one name or to any."""
    for left in folder.glob(f".{name}.{_HOST}.*.*.partial"):
        if _abandoned(left):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def cannot_write(path: str | Path, error: Exception) -> UserError:
    """The sentence for a write that failed."""
    return UserError(f"cannot write {shown_text(str(path))}: {getattr(error, 'strerror', None) or error}")


def alive(pid: int) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _short(path: Path) -> str:
    """The beginning of a name: with what is added it stays below 255 bytes."""
    return path.name.encode(errors="surrogateescape")[:120].decode(errors="ignore")


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{_short(path)}.{_HOST}.{os.getpid()}.{_PROCESS}{secrets.token_hex(4)}.{kind}")


def _literal(path: Path) -> str:
    """The beginning of a name as a pattern that only it matches."""
    return re.sub(r"([*?[])", r"[\1]", _short(path))


def _abandoned(path: Path) -> bool:
    pid, token = path.name.split(".")[-3:-1]
    if not pid.isdigit():
        return False
    return not token.startswith(_PROCESS) if int(pid) == os.getpid() else not alive(int(pid))


def _to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not folder:  # some network file systems take no folder
            raise
    finally:
        os.close(handle)


def _rename_to_new(partial: Path, path: Path) -> None:
    """Rename; UserError where something has the name already."""
    taken = UserError(f"{shown_text(str(path))} exists; pass overwrite (--overwrite) to replace it")
    if partial.is_dir():
        try:
            os.rename(partial, path)  # over an empty folder at most
        except OSError as error:
            if os.path.lexists(path):
                raise taken from error
            raise
        return
    try:
        os.link(partial, path)
    except FileExistsError as error:
        raise taken from error
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise taken from None
        os.replace(partial, path)


def _exchange(partial: Path, path: Path) -> None:
    """Put a folder in the place of another, which is removed."""
    if _swap(partial, path):
        shutil.rmtree(partial, ignore_errors=True)
        return
    old = _beside(path, "old")
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names in one step, where Linux and the file system can."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
