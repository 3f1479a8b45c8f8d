"""What every op does around its forms: a check of its sequences, full precision under autocast, packed rows for a
plain loop, decays in one shape, long sequences in pieces."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from inspect import signature
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.packing import check_packed
from subquad.kernels.state import accumulator_dtype

PIECE = 2048  # tokens
WIDEST = 256  # columns of a head that the matrix states' Triton kernels hold; triton/wide.py splits wider ones


Op = TypeVar("Op", bound=Callable[..., Any])


def sequence_op(op: Op) -> Op:
    """An op(tokens..., state=None, cu_seqlens=None) behind one check of its sequences.

    Where there are no tokens, outputs are empty, or zero in padding rows, and the state comes back as it was: forms
    need no case for that.
    """
    first = next(iter(signature(op).parameters))

    @wraps(op)
    def checked(*args, **kwargs):
        x, state, cu_seqlens = args[0] if args else kwargs[first], kwargs.get("state"), kwargs.get("cu_seqlens")
        check_packed(x, cu_seqlens, state)
        if x.shape[0] and x.shape[1] and (cu_seqlens is None or _has_tokens(cu_seqlens)):
            return op(*args, **kwargs)
        return _of_nothing(op, x.shape[:2], args, kwargs)

    return cast(Op, checked)


def _has_tokens(cu_seqlens: Tensor) -> bool:
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return cu_seqlens.numel() > 1
    return bool(cu_seqlens[-1])


def _of_nothing(op: Callable, rows: torch.Size, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `op` gives for `rows` [B, T] that hold no token: zeros whose other sizes are those of one zero token, in the
    graph of its inputs."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[:2] != rows:
            return x
        return torch.cat([x.flatten(0, 1)[:0], x.new_zeros(1, *x.shape[2:])])[None]

    found = op(*map(one, args), **{k: one(x) for k, x in kwargs.items() if k not in ("state", "cu_seqlens")})
    out = found[0] if isinstance(found, tuple) else found
    out = out[0, :0].sum(0).expand(*rows, *out.shape[2:]).contiguous()
    return (out, kwargs.get("state")) if isinstance(found, tuple) else out


def full_precision(like: Tensor) -> AbstractContextManager:
    """Switch autocast off: an op accumulates in float32 whatever surrounds it.

    Over 2,000 tokens a bf16 recurrence is off by 0.8, a float32 one by 7e-7.
    """
    if like.is_meta or not torch.is_autocast_enabled(like.device.type):  # the meta device raises when it is asked
        return nullcontext()  # entering autocast costs 4 us, as much as two operations on one token
    return torch.autocast(like.device.type, enabled=False)


def expand_decay(decay: Tensor | None, v: Tensor) -> Tensor | None:
    """The log decay as [B, T, H] or [B, T, H, K], in the accumulator's dtype."""
    if decay is None:
        return None
    B, T, H = v.shape[:3]
    g = decay.to(accumulator_dtype(decay.dtype) if decay.dtype == torch.float64 else accumulator_dtype(v.dtype))
    if g.dim() <= 2:
        if g.shape[0] != H:
            raise UserError(f"a constant decay is [H] or [H, K] with H = {H}; got {tuple(decay.shape)}")
        return g.expand(B, T, *g.shape)
    if g.dim() > 4 or g.shape[:3] != v.shape[:3]:
        raise UserError(
            f"a decay is [B, T, H] or [B, T, H, K] with {tuple(v.shape[:3])} first; got {tuple(decay.shape)}"
        )
    return g


def too_wide(q: Tensor) -> str | None:
    """Why the Triton form of a delta rule, whose transition mixes all of a key, cannot take these, if so."""
    return f"keys of width {q.shape[-1]}, above {WIDEST}" if q.shape[-1] > WIDEST else None


def by_sequence(
    form: Callable[..., tuple], inputs: Sequence[Tensor | None], states: Sequence[Tensor], cu_seqlens: Tensor
) -> tuple:
    """Run a batch form on each packed sequence in turn: (outputs [1, total, ...], new states [N, ...]...).

    It reads cu_seqlens on the host, so only the plain loops use it.
    """
    bounds = cu_seqlens.tolist()
    outs, lasts = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        rows = [None if x is None else x[:, start:end] for x in inputs]
        out, *last = form(*rows, *(s[n : n + 1] for s in states))
        outs.append(out)
        lasts.append(last)
    total = next(x.shape[1] for x in inputs if x is not None)
    outs.append(outs[0].new_zeros(1, total - bounds[-1], *outs[0].shape[2:]))
    return (torch.cat(outs, 1), *(torch.cat(parts) for parts in zip(*lasts, strict=True)))


def in_pieces(recurrence: Callable[..., tuple[Tensor, Tensor]], n_rows: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """`recurrence(rows [B, T, ...]..., S, ..., cu_seqlens)`, PIECE tokens after the other where that is all there is to
    it: without gradients, on a processor, whose caches hold a piece. At 32,768 tokens that is 1.3 to 1.7 times as fast.
    """

    def form(*arguments):
        rows, S, rest = arguments[:n_rows], arguments[n_rows], arguments[n_rows + 1 :]
        first, T = rows[0], rows[0].shape[1]
        whole = rest[-1] is not None or torch.is_grad_enabled() or first.device.type != "cpu"
        if whole or torch.compiler.is_compiling() or T <= PIECE:
            return recurrence(*arguments)
        outs = []
        for start in range(0, T, PIECE):
            piece = (None if x is None else x[:, start : start + PIECE] for x in rows)
            out, S = recurrence(*piece, S, *rest)
            outs.append(out)
        return torch.cat(outs, 1), S

    return form
