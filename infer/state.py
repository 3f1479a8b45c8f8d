"""A model's state as a value: fork, rewind, select, replace, count, save and load it.

Everything here reads the kinds of the fields (subquad.kernels.state) and never a layer's name, so it serves the state
of a whole model, of one layer, or of anyone's layer that keeps the contract.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

import subquad
from subquad.checksums import HEADER, SUMS, check, sums_of, write_tensors
from subquad.errors import UserError
from subquad.files import write_atomically
from subquad.kernels.state import leaves
from subquad.layers.base import dtype_of
from subquad.models.checkpoint import fingerprint, fingerprint_of_0_1
from subquad.models.lm import LM, LMState

State = TypeVar("State")
FORMAT = "subquad-state"
SHARED_BY_MARK = ("append", "pool")  # rows past the count are never read, so going back needs only the count


class Mark(NamedTuple):
    """A point to go back to: copies of what later tokens overwrite, None for what they only add to."""

    copies: tuple[Tensor | None, ...]


def mark(state: Any) -> Mark:
    """Remember `state`, to `rewind` to after trying some tokens. Caches that only grow are not copied."""
    return Mark(tuple(None if kind in SHARED_BY_MARK else t.detach().clone() for _, kind, t in leaves(state)))


@torch.no_grad()
def rewind(state: State, to: Mark) -> State:
    """Put `state` back to where `to` was taken, in place; a mark may be used any number of times."""
    for (_, _, tensor), copy in zip(leaves(state), to.copies, strict=True):
        if copy is not None:
            tensor.copy_(copy)
    return state


def fork(state: State, n: int) -> State:
    """Each sequence n times, copies next to each other: 0 0 0 1 1 1 for n = 3."""
    return _rebuilt(state, lambda path, kind, t: _owned(path, kind, t).repeat_interleave(n, 0))


def select(state: State, sequences: Sequence[int] | Tensor) -> State:
    """A copy with these sequences in this order, which may repeat or leave out some."""
    index = torch.as_tensor(sequences, dtype=torch.long)
    return _rebuilt(state, lambda path, kind, t: _owned(path, kind, t).index_select(0, index.to(t.device)))


def concatenate(states: Sequence[State]) -> State:
    """The sequences of several states in one; caches take the length of the longest."""
    columns = zip(*(leaves(state) for state in states), strict=True)

    def joined() -> Iterator[Tensor]:
        for column in columns:
            path, kind, _ = column[0]
            tensors = [_owned(path, kind, t) for _, _, t in column]
            if kind == "append":
                longest = max(t.shape[1] for t in tensors)
                tensors = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, longest - t.shape[1])) for t in tensors]
            yield torch.cat(tensors)

    return _refilled(states[0], joined())


@torch.no_grad()
def put(state: State, slots: int | Sequence[int], other: State) -> State:
    """Write the sequences of `other` into these slots of `state`, in place: addresses stay as they are."""
    rows = torch.tensor([slots] if isinstance(slots, int) else list(slots))
    for (path, kind, target), (_, _, source) in zip(leaves(state), leaves(other), strict=True):
        _owned(path, kind, target)
        if kind == "append" and source.shape[1] <= target.shape[1]:
            target = target[:, : source.shape[1]]
        if source.shape[1:] != target.shape[1:]:
            raise UserError(f"put: {path} is {tuple(source.shape[1:])} a sequence, its slot {tuple(target.shape[1:])}")
        target[rows.to(target.device)] = source.to(target)
    return state


def reset(state: State, slots: int | Sequence[int], model: Any) -> State:
    """Empty these slots, in place: they become what `model.init_state` gives (running maxima do not start at zero)."""
    n = 1 if isinstance(slots, int) else len(slots)
    fresh = model.init_state(n, capacity(state))
    pairs = zip(leaves(fresh), leaves(state), strict=True)
    cut = (new[:, : old.shape[1]] if kind == "append" else new for (_, kind, new), (_, _, old) in pairs)
    return put(state, slots, _refilled(fresh, cut))


def detach(state: State) -> State:
    """The same values without their history, as truncated backpropagation carries them on."""
    return _rebuilt(state, lambda path, kind, t: t.detach())


def nbytes(state: Any) -> int:
    """Bytes of the state's tensors as they are allocated."""
    return sum(t.numel() * t.element_size() for _, _, t in leaves(state))


def capacity(state: Any) -> int:
    """The tokens that fit the state's caches; 1 where nothing is allocated by length."""
    return max((t.shape[1] for _, kind, t in leaves(state) if kind in ("append", "ring")), default=1)


def save_state(
    path: str | Path, model: LM, state: LMState, *, extra: Mapping[str, Tensor] | None = None, overwrite: bool = False
) -> None:
    """Write the state of `model` and some `extra` tensors to a safetensors file that only this model will load.

    Of caches only what is filled is written. The file appears whole or not at all.
    """
    read = max((int(t.max()) for _, kind, t in leaves(state) if kind == "count" and t.numel()), default=0)
    needed = {name: t.shape[1] for name, kind, t in leaves(model.init_state(1, max(read, 1))) if kind == "append"}
    tensors = {f"extra.{name}": t for name, t in (extra or {}).items()}
    for name, kind, t in leaves(state):
        tensors[f"state.{name}"] = _as_real(t[:, : needed[name]] if read and kind == "append" else t)
    # A clone where the tensor is a view: safetensors refuses tensors that share memory.
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    about = {
        "format": FORMAT,
        "version": subquad.__version__,
        "fingerprint": fingerprint(model),
        "dtype": _dtype_name(model),
        "sequences": str(_batch(state)),
        "room": str(read or capacity(state)),  # of the caches as they are in the file
    }
    write_atomically(path, lambda partial: write_tensors(tensors, partial, about), overwrite=overwrite)


def load_state(
    path: str | Path, model: LM, *, room: Callable[[dict[str, Tensor]], int] = lambda extra: 0
) -> tuple[LMState, dict[str, Tensor]]:
    """The state and the extra tensors of a file written by `save_state` for this model.

    `room`: given the extra tensors, the tokens that the caches must have room for, those of the file included.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no state file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            _check_origin(path, about, model)
            sums = sums_of(path, file)
            names = set(file.keys())
            n, stored = _count(path, about, "sequences"), _count(path, about, "room")
            _check_shapes(path, file, names, model, n, stored)
            extra = {
                name.removeprefix("extra."): check(path, name, file.get_tensor(name), sums).clone()
                for name in names
                if name.startswith("extra.")
            }
            state = model.init_state(n, max(stored, room(extra)))
            with torch.no_grad():
                for name, kind, target in leaves(state):
                    source = check(path, f"state.{name}", file.get_tensor(f"state.{name}"), sums)
                    target = _as_real(target)
                    if kind == "append":
                        target = target[:, : source.shape[1]]
                    target.copy_(source)
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} is damaged or no state file: {' '.join(str(error).split())}") from error
    return state, extra


def _count(path: Path, about: Mapping[str, str], name: str) -> int:
    """A number of the metadata, at least 0."""
    text = about[name]
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise UserError(f"{path} is damaged or no state file: {name} is {text[:40]!r}, which is no number")
    return int(text)


def _check_shapes(path: Path, file: Any, names: set[str], model: LM, n: int, room: int) -> None:
    """Compare the file's header with the state that it says it holds, before anything of its size is allocated."""
    found = {name: file.get_slice(name) for name in names}
    for name, kind, target in leaves(model.init_state(1, 1)):
        if f"state.{name}" not in names:
            raise UserError(f"{path} does not fit the model: tensor {'state.' + name!r} is missing")
        shape, wanted = tuple(found[f"state.{name}"].get_shape()), tuple(_as_real(target).shape)
        # Of caches the tokens that they hold, which are 0 where a window is smaller, stand second.
        fits = shape[:1] == (n,) and len(shape) == len(wanted)
        if kind in ("append", "ring"):
            fits = fits and shape[2:] == wanted[2:] and shape[1] <= max(room, wanted[1])
        else:
            fits = fits and shape[1:] == wanted[1:]
        if not fits:
            raise UserError(f"{path} does not fit the model: {name} is {shape}, the model has {(n, *wanted[1:])}")


def _check_origin(path: Path, about: Mapping[str, str], model: LM) -> None:
    if about.get("format") != FORMAT:
        raise UserError(f"{path} is no state file of subquad")
    theirs, mine = about["dtype"], _dtype_name(model)
    if theirs != mine:
        raise UserError(f"{path} was saved by a {theirs} model, this one is {mine}; load it as {theirs} (--dtype)")
    theirs = about["fingerprint"]
    mine = fingerprint(model) if SUMS in about or HEADER in about else fingerprint_of_0_1(model)
    if theirs != mine:
        raise UserError(f"{path} belongs to another model: it was saved by {theirs[:12]}, this one is {mine[:12]}")


def _dtype_name(model: LM) -> str:
    return str(dtype_of(model)).removeprefix("torch.")


def _batch(state: Any) -> int:
    sizes = [t.shape[0] for _, _, t in leaves(state)]
    return sizes[0] if sizes else 1


def _as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of reals, which safetensors can hold in any precision."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _owned(path: str, kind: str, tensor: Tensor) -> Tensor:
    """The tensor, if its first dimension is the sequences."""
    if kind == "pool":
        raise TypeError(f"{path} is a pool of pages that sequences share; it has no rows of its own to move")
    return tensor


def _rebuilt(state: State, change: Callable[[str, str, Tensor], Tensor]) -> State:
    return _refilled(state, (change(path, kind, t) for path, kind, t in leaves(state)))


def _refilled(state: Any, tensors: Iterator[Tensor]) -> Any:
    """A state of the same structure from tensors in the order of `leaves`."""
    if isinstance(state, Tensor):
        return next(tensors)
    if hasattr(state, "_fields"):
        return type(state)(*(_refilled(item, tensors) for item in state))
    return tuple(_refilled(item, tensors) for item in state) if isinstance(state, tuple) else state
