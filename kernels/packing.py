"""Sequences packed in one row: where they start, which token is whose, and how to cut them into chunks.

`cu_seqlens` is int32 [N+1]: sequence n is rows cu_seqlens[n] .. cu_seqlens[n+1]-1 of x [1, total, D]. A sequence may be
empty; rows from cu_seqlens[-1] on are padding. Nothing here reads cu_seqlens on the host: every shape follows from the
bounds total and N, so it also serves under torch.compile and in CUDA graphs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subquad.errors import UserError


def pack(x: Float[Tensor, "B T *D"], mask: Bool[Tensor, "B T"]) -> tuple[Float[Tensor, "1 total *D"], Int[Tensor, "N"]]:
    """Pack a padded batch into one row: (row [1, total, ...], cu_seqlens [B+1]).

    `mask` is True where a token is real; the order of tokens within a sequence is kept, wherever the padding lies.
    `unpack(row, mask)` inverts it. Cost: one gather, and one host read for the total.
    """
    if x.shape[:2] != mask.shape:
        raise UserError(f"pack: mask has shape {tuple(mask.shape)}, x {tuple(x.shape)}; their first two must agree")
    return x[mask].unsqueeze(0), cu_seqlens_of(mask.sum(1))


def unpack(row: Float[Tensor, "1 total *D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T *D"]:
    """The padded batch of a row made by `pack`; zero where `mask` is False."""
    count = int(mask.sum())
    if row.shape[0] != 1 or row.shape[1] < count:
        raise UserError(f"unpack: the mask has {count} tokens, the row has shape {tuple(row.shape)}")
    out = row.new_zeros(*mask.shape, *row.shape[2:])
    out[mask] = row[0, :count]
    return out


def cu_seqlens_of(lengths: Int[Tensor, "N"]) -> Int[Tensor, "M"]:
    """Boundaries [N+1] of sequences with these lengths, int32 as the ecosystem has them."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def check_packed(x: Tensor, cu_seqlens: Tensor | None, state: object = None) -> None:
    """One sentence for a call that cannot be meant. Boundaries are read where that costs nothing, on the CPU."""
    while isinstance(state, tuple) and state:
        state = state[0]
    if cu_seqlens is None:
        if isinstance(state, Tensor) and state.shape[0] != x.shape[0]:
            raise UserError(f"the state is of {state.shape[0]} sequences, x of {x.shape[0]}; one state goes on each")
        return
    if cu_seqlens.dim() != 1 or not cu_seqlens.numel() or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UserError(
            f"cu_seqlens is an integer vector of N+1 boundaries, int32 or int64; got {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)}"
        )
    if x.shape[0] != 1:
        raise UserError(f"packed input has batch 1 and all sequences in one row; x has batch {x.shape[0]}")
    count = cu_seqlens.numel() - 1
    if isinstance(state, Tensor) and state.shape[0] != count:
        raise UserError(f"the state is of {state.shape[0]} sequences, cu_seqlens of {count}; one state goes on each")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] or bounds[-1] > x.shape[1] or bounds != sorted(bounds):
        given = ", ".join(map(str, bounds if count < 8 else [*bounds[:4], "...", *bounds[-3:]]))
        raise UserError(
            f"cu_seqlens starts at 0, never decreases and ends within the {x.shape[1]} tokens of x; got {given}"
        )


def sequence_ids(time: int, cu_seqlens: Int[Tensor, "M"]) -> tuple[Int[Tensor, "T"], Bool[Tensor, "T"]]:
    """For each of `time` rows: the sequence it belongs to, and whether it belongs to one at all (False: padding)."""
    t = torch.arange(time, device=cu_seqlens.device)
    ids = torch.searchsorted(cu_seqlens[1:].long(), t, right=True)
    return ids.clamp(max=cu_seqlens.numel() - 2), t < cu_seqlens[-1]


def mask_padding(y: Float[Tensor, "B T *D"], cu_seqlens: Int[Tensor, "M"] | None) -> Float[Tensor, "B T *D"]:
    """y with the rows past cu_seqlens[-1] zero, whatever stood in them (NaN too)."""
    if cu_seqlens is None:
        return y
    real = torch.arange(y.shape[1], device=y.device) < cu_seqlens[-1]
    return torch.where(real.view(-1, *[1] * (y.dim() - 2)), y, 0)


def positions(
    time: int, count: Int[Tensor, "N"] | None, cu_seqlens: Int[Tensor, "M"] | None, device: torch.device | None = None
) -> Int[Tensor, "B T"]:
    """Position of each new token in its sequence, [N, T] or [1, T] (packed: [1, total]; without a count from 0)."""
    if cu_seqlens is None:
        t = torch.arange(time, device=device if count is None else count.device)
        return t[None] if count is None else count[:, None] + t
    if cu_seqlens.numel() == 1:  # no sequences, so all is padding
        return torch.zeros(1, time, dtype=torch.int64, device=cu_seqlens.device)
    ids, _ = sequence_ids(time, cu_seqlens)
    local = torch.arange(time, device=cu_seqlens.device) - cu_seqlens.long()[ids]
    return (local if count is None else local + count[ids])[None]


def host_counts(count: Int[Tensor, "N"] | None) -> list[int] | None:
    """The counts where the host can read them at no cost, on a CPU, else None."""
    if count is None or count.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return count.tolist()


def advance(count: Int[Tensor, "N"], time: int, cu_seqlens: Int[Tensor, "M"] | None) -> Int[Tensor, "N"]:
    """The count after `time` new tokens a sequence, or after the packed lengths; in place under `no_grad`."""
    step = time if cu_seqlens is None else cu_seqlens.diff().to(count.dtype)
    return count + step if torch.is_grad_enabled() else count.add_(step)


class Prefixed:
    """Rows with the last `width` inputs of each sequence put in front of its new ones.

    One buffer serves a batch ([B, width + T, D]) and packed rows ([1, total + N * width, D]), so a causal filter needs
    no case of its own for sequence starts: it runs over the buffer, `new` picks the rows of new tokens from its
    output, and `last` the rows to carry on.
    """

    def __init__(self, time: int, width: int, cu_seqlens: Tensor | None):
        self.time, self.width, self.cu_seqlens = time, width, cu_seqlens
        if cu_seqlens is not None:
            ids, self.valid = sequence_ids(time, cu_seqlens)
            self.rows = torch.arange(time, device=cu_seqlens.device) + (ids + 1) * width
            ends = cu_seqlens[1:].long() + torch.arange(1, cu_seqlens.numel(), device=cu_seqlens.device) * width
            self.tails = ends[:, None] - width + torch.arange(width, device=cu_seqlens.device)
            self.starts = self.tails - cu_seqlens.diff()[:, None]

    def join(self, before: Tensor, x: Tensor) -> Tensor:
        """The buffer of `before` [N, width, D] and the new tokens x."""
        if self.cu_seqlens is None:
            return torch.cat([before, x], 1)
        buffer = x.new_zeros(x.shape[1] + before.shape[0] * self.width, *x.shape[2:])
        buffer = buffer.index_copy(0, self.starts.flatten(), before.flatten(0, 1).to(x.dtype))
        # Padding rows all lie past the last sequence, so their targets are distinct and are never read as `tails`.
        return buffer.index_copy(0, self.rows, x[0]).unsqueeze(0)

    def new(self, out: Tensor) -> Tensor:
        """The rows of new tokens of a buffer-long `out`; padding rows are zero."""
        if self.cu_seqlens is None:
            return out[:, self.width :]
        picked = out[0].index_select(0, self.rows)
        return torch.where(self.valid.view(-1, *[1] * (picked.dim() - 1)), picked, 0).unsqueeze(0)

    def last(self, buffer: Tensor) -> Tensor:
        """The last `width` rows of each sequence, [N, width, D]."""
        if self.cu_seqlens is None:
            return buffer[:, buffer.shape[1] - self.width :]
        return buffer[0].index_select(0, self.tails.flatten()).unflatten(0, self.tails.shape)


class Padded:
    """Packed sequences as a padded batch [N, length, ...], one row a sequence; a batch stays as it is.

    On a CPU the longest sequence is read for `length`, elsewhere the bound `time` serves. `filled` [N, length] is True
    where a token is real, None for a batch.
    """

    def __init__(self, time: int, cu_seqlens: Tensor | None):
        self.time, self.length, self.cu_seqlens = time, time, cu_seqlens
        self.filled: Tensor | None = None
        if cu_seqlens is None:
            return
        lengths = cu_seqlens.diff().long()
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            self.length = int(lengths.max())
        t = torch.arange(self.length, device=cu_seqlens.device)
        self.filled = t < lengths[:, None]
        self.source = (cu_seqlens[:-1].long()[:, None] + t).clamp(max=max(time - 1, 0))

    def split(self, x: Tensor) -> Tensor:
        """[1, total, ...] -> [N, length, ...], zero past a sequence's end."""
        if self.filled is None:
            return x
        return torch.where(self.filled.view(*self.filled.shape, *[1] * (x.dim() - 2)), x[0][self.source], 0)

    def join(self, x: Tensor) -> Tensor:
        """[N, length, ...] -> [1, total, ...]; padding rows are zero."""
        if self.cu_seqlens is None:
            return x
        if not self.length:
            return x.new_zeros(1, self.time, *x.shape[2:])
        ids, _ = sequence_ids(self.time, self.cu_seqlens)
        local = positions(self.time, None, self.cu_seqlens)[0].clamp(max=self.length - 1)
        return mask_padding(x[ids, local][None], self.cu_seqlens)


class Chunks:
    """Sequences cut into chunks of `size` tokens, none of which spans two sequences; short ones are filled with zeros.

    A batch [B, T, ...] becomes [B, n, size, ...]; a packed row [1, total, ...] becomes [1, total // size + N, size,
    ...], whose chunks belong to one sequence after the other (the last ones to none).
    """

    def __init__(self, x: Tensor, size: int, cu_seqlens: Tensor | None):
        self.time, self.size, self.cu_seqlens = x.shape[1], size, cu_seqlens
        if cu_seqlens is None:
            self.count = -(-self.time // size)
            return
        cu, device = cu_seqlens.long(), cu_seqlens.device
        n_seqs = cu.numel() - 1
        self.count = self.time // size + n_seqs
        lengths = cu.diff()
        ends = ((lengths + size - 1) // size).cumsum(0)
        starts = F.pad(ends, (1, 0))[:-1]
        chunk = torch.arange(self.count, device=device)
        self.sequence = torch.searchsorted(ends, chunk, right=True).clamp(max=n_seqs - 1)
        self.start = cu[self.sequence] + (chunk - starts[self.sequence]) * size  # the row of a chunk's first token
        token = self.start[:, None] + torch.arange(size, device=device)
        self.filled = token < cu[self.sequence + 1, None]
        self.token = token.clamp(max=max(self.time - 1, 0)).flatten()
        self.first = (chunk == starts[self.sequence])[:, None]
        self.last_of = (ends - 1).clamp(min=0)
        self.nonempty = lengths > 0
        ids, self.valid = sequence_ids(self.time, cu_seqlens)
        local = torch.arange(self.time, device=device) - cu[ids]
        slot = (starts[ids] + local // size) * size + local % size
        self.slot = slot.clamp(max=self.count * size - 1)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, n, size, ...]."""
        if self.cu_seqlens is None:
            missing = self.count * self.size - self.time
            if missing:
                x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
            return x.unflatten(1, (self.count, self.size))
        if not self.time:
            return x.new_zeros(1, self.count, self.size, *x.shape[2:])
        rows = x[0].index_select(0, self.token).unflatten(0, (self.count, self.size))
        return torch.where(self.filled.view(*self.filled.shape, *[1] * (x.dim() - 2)), rows, 0).unsqueeze(0)

    def join(self, x: Tensor) -> Tensor:
        """[B, n, size, ...] -> [B, T, ...]; padding rows are zero."""
        if self.cu_seqlens is None:
            return x.flatten(1, 2)[:, : self.time]
        rows = x[0].flatten(0, 1).index_select(0, self.slot)
        return torch.where(self.valid.view(-1, *[1] * (rows.dim() - 1)), rows, 0).unsqueeze(0)

    def carry(self, init: Tensor, step: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Run S -> step(i, S) over the chunks: (S before each chunk [B, n, ...], final S [N, ...]).

        Packed, a sequence's first chunk starts from its own row of `init`, and an empty one's final state is that row.
        """
        packed = self.cu_seqlens is not None
        state = init[:1] if packed else init
        before, after = [], []
        for i in range(self.count):
            if packed:
                here = init.index_select(0, self.sequence[i : i + 1])
                state = torch.where(self.first[i].view(-1, *[1] * (init.dim() - 1)), here, state)
            before.append(state)
            state = step(i, state)
            after.append(state)
        stacked = torch.stack(before, 1)
        if not packed:
            return stacked, state
        ends = torch.cat(after).index_select(0, self.last_of)
        return stacked, torch.where(self.nonempty.view(-1, *[1] * (init.dim() - 1)), ends, init)
