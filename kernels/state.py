"""What a state is made of, and how an op hands it back.

A state is a NamedTuple of tensors, sequences first, each field annotated with its kind:

    class Mamba2State(NamedTuple):
        conv: Recurrent   # [N, W-1, D]
        ssm: Recurrent    # [N, H, K, V]

Whatever forks, rewinds, counts or saves states reads the kinds and never a layer's name.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias, get_args, get_type_hints

import torch
from torch import Tensor

Recurrent: TypeAlias = Annotated[Tensor, "recurrent"]  # rewritten by every token
Append: TypeAlias = Annotated[Tensor, "append"]  # a cache allocated for max_len, written once per slot
Ring: TypeAlias = Annotated[Tensor, "ring"]  # a window's cache, slots reused in turn
Pool: TypeAlias = Annotated[Tensor, "pool"]  # pages shared between sequences
Count: TypeAlias = Annotated[Tensor, "count"]  # [N] int64, tokens seen so far
Derived: TypeAlias = Annotated[Tensor, "derived"]  # computed from other fields, kept for speed

KINDS = ("recurrent", "append", "ring", "pool", "count", "derived")


class KVCache(NamedTuple):
    """Keys and values of every token so far, in slots 0..count-1 of max_len."""

    k: Append  # [N, S, G, K]
    v: Append  # [N, S, G, V]
    count: Count  # [N]


class RingCache(NamedTuple):
    """Keys and values of the first `n_sinks` tokens and of the last `S - n_sinks`.

    Position p lies in slot p if p < n_sinks, else in slot n_sinks + (p - n_sinks) % (S - n_sinks).
    """

    k: Ring  # [N, S, G, K]
    v: Ring  # [N, S, G, V]
    count: Count  # [N]


def field_kinds(state_type: type) -> dict[str, str | None]:
    """Field name -> kind of a state NamedTuple; None for a field that is a state itself."""
    kinds: dict[str, str | None] = {}
    for name, hint in get_type_hints(state_type, include_extras=True).items():
        # The kind of a field that may be absent, `Recurrent | tuple[()]`, is one level further in.
        found = [a for part in (hint, *get_args(hint)) for a in get_args(part)[1:] if a in KINDS]
        if not found and (hint is Tensor or Tensor in get_args(hint)):
            raise TypeError(
                f"{state_type.__name__}.{name} declares no kind; annotate it with one of subquad's: {KINDS}"
            )
        kinds[name] = found[0] if found else None
    return kinds


def commit(donated: Tensor, new: Tensor) -> Tensor:
    """The new value of a state tensor: written into the donated one unless gradients are recorded.

    Under `no_grad` the address never changes, so a CUDA graph can replay the step; under grad nothing is mutated.
    """
    if torch.is_grad_enabled():
        return new.to(donated.dtype)
    return donated if new is donated else donated.copy_(new)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an accumulating state of inputs of `dtype` is kept in: at least float32."""
    return dtype if dtype == torch.float32 else torch.promote_types(dtype, torch.float32)


def leaves(state: Any) -> list[tuple[str, str, Tensor]]:
    """Every tensor of a state as (path, kind, tensor), nested states and tuples of states included."""
    found: list[tuple[str, str, Tensor]] = []

    def walk(value: Any, path: str) -> None:
        if hasattr(value, "_fields"):
            for name, kind in field_kinds(type(value)).items():
                item = getattr(value, name)
                if kind is not None and isinstance(item, Tensor):
                    found.append((f"{path}{name}", kind, item))
                elif item is not None:
                    walk(item, f"{path}{name}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                walk(item, f"{path}{i}.")
        elif value is not None:
            raise TypeError(f"a state is made of NamedTuples of tensors; {path or 'it'} is a {type(value).__name__}")

    walk(state, "")
    return found


def map_leaves(state: Any, change: Callable[[str, str, Tensor], Tensor]) -> Any:
    """The same state with each tensor replaced by change(path, kind, tensor)."""
    new = iter([change(*leaf) for leaf in leaves(state)])

    def rebuild(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(new)
        if hasattr(value, "_fields"):
            return type(value)(*(rebuild(item) for item in value))
        return tuple(rebuild(item) for item in value) if isinstance(value, tuple) else value

    return rebuild(state)
