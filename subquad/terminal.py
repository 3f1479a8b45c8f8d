"""Standard streams that never end a command: what cannot be shown is remembered, and the work goes on to its files."""

import io
import os
import select
import sys
from typing import TextIO


class _Raw(io.RawIOBase):
    """Writes to a descriptor until it fails once (its reader has gone, the device is full), then to nothing."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data) -> int:  # type: ignore[no-untyped-def,override]
        while self.error is None:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError:  # someone else made it non-blocking
                select.select([], [self.descriptor], [])
            except OSError as error:
                self.error = error
        return len(data)


_shown: _Raw | None = None


def guard() -> None:
    """Make stdout and stderr such streams, and closed standard descriptors ones that hold nothing.

    Characters that the encoding lacks are shown as escapes. Streams that someone replaced (a test, a notebook) stay.
    """
    global _shown
    for descriptor in (0, 1, 2):  # else the next file that is opened gets the number, and is printed into
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream: TextIO | None = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or isinstance(getattr(stream, "buffer", None), _Buffer):
            continue
        raw = _Raw(descriptor)
        encoding = stream.encoding if stream is not None else "utf-8"
        if stream is not None:
            stream.flush()
        lines = descriptor == 2 or raw.isatty()
        guarded = io.TextIOWrapper(_Buffer(raw), encoding, "backslashreplace", line_buffering=lines)
        setattr(sys, name, guarded)
        setattr(sys, f"__{name}__", guarded)
        if descriptor == 1:
            _shown = raw


class _Buffer(io.BufferedWriter):
    """Tells a guarded stream from another."""


def failure() -> OSError | None:
    """Why nothing can be shown on stdout any more, if so: BrokenPipeError where its reader has gone."""
    return None if _shown is None else _shown.error
