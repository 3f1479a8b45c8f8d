"""Tapes: what a call of an operator does on its device, done again without finding out how.

Which kernels a call launches, with what, and what room it makes for that, follows from the layouts of the tensors it
is given. Working it out takes the host longer than a small kernel runs, so a call is recorded when its layouts are met
for the second time: torch's operators, allocations and launches, in order. After that a function made of just those
lines does the same to other tensors, and drops each as soon as the last line that reads it is done.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import wraps
from threading import Lock, local
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from subquad.kernels.triton import configs

KEPT = 256  # tapes of an operator; the one used longest ago goes first
ROOM = {
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        ("empty", "memory_format"), ("empty_like", "default"), ("empty_strided", "default"), ("new_empty", "default"),
        ("new_empty_strided", "default"),
    )
}  # fmt: skip
STREAM = object()  # stands for the current one
_MET, _NEVER = object(), object()  # layouts met once; whose calls cannot be recorded


class _Recording(local):
    tape: "Tape | None" = None


_recording = _Recording()


def recording() -> "Tape | None":
    """The tape that this thread's launches belong to."""
    return _recording.tape


class Tape(TorchDispatchMode):
    """Sees one call with these arguments; `replay` makes the function that repeats it."""

    def __init__(self, arguments: Sequence[Any]):
        super().__init__()
        self.names = WeakTensorKeyDictionary()  # of what is alive, so that a recorded call keeps nothing longer
        self.bound: dict[str, Any] = {"torch": torch}
        self.lines: list[tuple[str, list[str]]] = []  # and the names each makes
        self.reads: dict[str, int] = {}  # the last line that reads each name
        self.streams = False  # whether a line needs one
        self.repeatable = True  # until it depends on more than layouts: on values, or on tensors from outside
        self.index = next((x.get_device() for x in arguments if isinstance(x, Tensor)), -1)
        self.parameters = []
        for number, x in enumerate(arguments):
            self.parameters.append(f"a{number}")
            if isinstance(x, Tensor):
                self.names[x] = f"a{number}"

    def __enter__(self) -> "Tape":
        _recording.tape = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _recording.tape = None
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        out = function(*arguments, **options)
        if not isinstance(out, (Tensor, tuple, list)) and not any(isinstance(x, Tensor) for x in arguments):
            return out  # of types alone
        if function in ROOM:
            room = {"dtype": out.dtype, "device": out.device}
            self._add("torch.empty_strided", (out.shape, out.stride()), room, out)
        else:
            self._add(self._bind(function), arguments, options, out)
        return out

    def launch(
        self, function: Any, arguments: Sequence[Any], options: dict[str, Any] | None = None, *,
        before: Sequence[Any] = (), after: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        """A launch by `function(*before, *arguments, *after, **options)`, where STREAM is that of the moment.

        Without options it takes addresses, about which a launcher need not ask the driver.
        """
        self._add(self._bind(function), arguments, options or {}, None, before, after, addresses=options is None)

    def replay(self, result: Any) -> Callable[..., Any] | None:
        """A function of the arguments that does it all again; None if it would not be the same."""
        returned = self._text(result, len(self.lines))
        if not self.repeatable:
            return None
        body = ["stream = raw_stream(index)"] if self.streams else []
        for number, (line, made) in enumerate(self.lines):
            body.append(line)
            done = [name for name, last in self.reads.items() if last == number]
            done += [name for name in made if name not in self.reads]
            if done := [name for name in done if not name.startswith("a")]:
                body.append(f"del {', '.join(done)}")
        body.append(f"return {returned}")
        source = f"def replay({', '.join(self.parameters)}):\n" + "".join(f"    {line}\n" for line in body)
        self.bound |= {"index": self.index, "raw_stream": getattr(torch._C, "_cuda_getCurrentRawStream", None)}
        exec(compile(source, "<tape>", "exec"), self.bound)
        run = self.bound["replay"]
        return run if self.index < 0 else _on_device(run, self.index)

    def _add(
        self, call: str, arguments: Any, options: dict[str, Any], out: Any, before: Sequence[Any] = (),
        after: Sequence[Any] = (), addresses: bool = False,
    ) -> None:  # fmt: skip
        here = len(self.lines)
        texts = [self._text(x, here) for x in before]
        texts += [self._text(x, here, address=addresses) for x in arguments]
        texts += [self._text(x, here) for x in after]
        texts += [f"{name}={self._text(x, here)}" for name, x in options.items()]
        line, made = f"{call}({', '.join(texts)})", []
        found = () if out is None else (out,) if isinstance(out, Tensor) else out
        if not isinstance(found, (tuple, list)) or not all(isinstance(x, Tensor) for x in found):
            self.repeatable = False  # a value that was read on the host, say
            return
        for x in found:
            if x not in self.names:
                made.append(f"t{here}_{len(made)}")
                self.names[x] = made[-1]
        if made:
            targets = [self.names[x] for x in found]
            line = f"{targets[0] if out is found[0] else ', '.join(targets) + ','} = {line}"
        self.lines.append((line, made))

    def _text(self, x: Any, here: int, address: bool = False) -> str:
        """What stands for a value in line `here`."""
        if isinstance(x, Tensor):
            if x not in self.names:
                self.repeatable &= x.numel() == 0  # nothing reads one without elements
                return self._bind(x) + ".data_ptr()" * address
            name = self.names[x]
            self.reads[name] = here
            return name + ".data_ptr()" * address
        if isinstance(x, (list, tuple)):
            return f"({''.join(self._text(y, here, address) + ', ' for y in x)})"
        if x is STREAM:
            self.streams = True
            return "stream"
        if x is None or type(x) in (int, bool):
            return repr(x)
        return self._bind(x)

    def _bind(self, x: Any) -> str:
        name = next((name for name, y in self.bound.items() if y is x), f"c{len(self.bound)}")
        self.bound[name] = x
        return name


def _on_device(run: Callable[..., Any], index: int) -> Callable[..., Any]:
    def replay(*arguments: Any) -> Any:
        if index == torch.cuda.current_device():
            return run(*arguments)
        with torch.cuda.device(index):
            return run(*arguments)

    return replay


def hooked() -> bool:
    """Whether a profiler wants to see every launch of Triton's."""
    runtime = triton.knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))


def taped(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, replayed once its arguments' layouts were met twice. It may depend on nothing else about tensors."""
    layout = _layout(function)
    tapes: OrderedDict[tuple, Any] = OrderedDict()
    lock = Lock()  # backward passes run in threads of their own
    _tapes.append(tapes)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        if torch._C._len_torch_dispatch_stack() or configs.recording() or hooked():
            return function(*arguments)
        key = (configs.generation(), torch.get_float32_matmul_precision(), *layout(*arguments))
        with lock:
            found = tapes.get(key)
            tapes[key] = found or _MET
            tapes.move_to_end(key)
            if len(tapes) > KEPT:
                tapes.popitem(last=False)
        if found is None or found is _NEVER:
            return function(*arguments)
        if found is not _MET:
            return found(*arguments)
        tensors = [id(x) for x in arguments if isinstance(x, Tensor)]
        if len(set(tensors)) < len(tensors):  # a tape could not tell which of the two is meant
            return function(*arguments)
        with Tape(arguments) as tape:
            result = function(*arguments)
        replay = tape.replay(result)
        with lock:
            tapes[key] = replay or _NEVER
        return result

    return call


_tapes: list[OrderedDict[tuple, Any]] = []


def forget() -> None:
    """Work every call out anew."""
    for tapes in _tapes:
        tapes.clear()


def counts() -> tuple[int, int]:
    """How many tapes there are, and how many layouts whose calls could not be recorded."""
    found = [x for tapes in _tapes for x in tapes.values() if x is not _MET]
    never = sum(x is _NEVER for x in found)
    return len(found) - never, never


def _layout(function: Callable[..., Any]) -> Callable[..., tuple]:
    """A function of the same arguments that tells apart all that `function` can."""
    parts = []
    parameters = inspect.signature(function).parameters
    for x, parameter in parameters.items():
        if parameter.annotation in (Tensor, Tensor | None):
            seen = f"({x}.shape, {x}.stride(), {x}.dtype, {x}.data_ptr() & 15, {x}.get_device())"
            parts.append(seen if parameter.annotation is Tensor else f"None if {x} is None else {seen}")
        else:
            parts.append(x)
    return eval(f"lambda {', '.join(parameters)}: ({', '.join(parts)},)")
