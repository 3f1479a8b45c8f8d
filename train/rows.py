"""Documents packed into rows: which tokens batch number n holds is a pure function of (seed, n)."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from subquad.train.corpus import Tokens

IGNORED = -100  # a target that no loss is taken of


class Carry(NamedTuple):
    """How the M sequences of a row continue those of the row before, for truncated backpropagation.

    continues [M]: the sequence goes on from its stream's state; otherwise it starts a document. stream [M]: which
    stream it is of. last [N]: the last sequence of each stream, whose state is carried on.
    """

    continues: Tensor
    stream: Tensor
    last: Tensor


class Batch(NamedTuple):
    """One packed row: tokens, targets [1, T]; cu_seqlens [M+1]. Or rows of one length: [B, T]; cu_seqlens None.

    targets are -100 where nothing is to be predicted.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    bytes_per_token: float
    carry: Carry | None


class Rows:
    """Rows of `row` tokens, drawn from documents cut into pieces of at most `context` tokens.

    An epoch lays all pieces end to end, in an order drawn from (seed, epoch), and cuts that line into `streams` equal
    parts a process. A row takes the next row / streams tokens of each of its process's streams; a piece that crosses a
    row's end goes on in the next one, from its state if the state is carried, else from nothing. An epoch covers every
    token once; its last rows are padded. The number of sequences is rounded up to a power of two (the others are
    empty), so that a run sees few shapes.
    """

    def __init__(
        self,
        data: Tokens,
        *,
        context: int,
        row: int,
        streams: int = 1,
        carry: bool = False,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        self.data, self.row, self.streams, self.carry, self.seed, self.rank = data, row, streams, carry, seed, rank
        lengths = np.diff(data.starts)
        pieces = -(-lengths // context)
        document = np.repeat(np.arange(len(lengths)), pieces)
        nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self.starts = data.starts[document] + nth * context
        self.document_end = data.starts[document + 1]
        self.lengths = np.minimum(context, self.document_end - self.starts)
        self.total = int(lengths.sum())
        self.part = -(-self.total // (streams * world))
        self.step = row // streams
        self.per_epoch = -(-self.part // self.step)
        self._line = lru_cache(maxsize=2)(self._lay_out)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(order of the pieces, where each begins on the epoch's line)."""
        n = len(self.lengths)
        order = np.arange(n) if self.seed is None else np.random.default_rng([self.seed, epoch]).permutation(n)
        return order, np.concatenate([[0], np.cumsum(self.lengths[order])])

    def __getitem__(self, position: int) -> Batch:
        epoch, step = divmod(position, self.per_epoch)
        tokens = np.zeros(self.row, np.int64)
        targets = np.full(self.row, IGNORED, np.int64)
        bounds, continues, stream, last = [0], [], [], []
        for s in range(self.streams):
            for piece, skip, count in self._segments(epoch, step, s):
                at, source = bounds[-1], self.starts[piece] + skip
                tokens[at : at + count] = self.data.tokens[source : source + count]
                known = min(count, self.document_end[piece] - source - 1)
                targets[at : at + known] = self.data.tokens[source + 1 : source + 1 + known]
                bounds.append(at + count)
                continues.append(step > 0 and skip > 0)
                stream.append(s)
            last.append(max(len(stream) - 1, 0))
        empty = (1 << max(len(stream) - 1, 0).bit_length()) - len(stream)
        carry = None
        if self.carry:
            flags = torch.tensor(continues + [False] * empty)
            carry = Carry(flags, torch.tensor(stream + [0] * empty), torch.tensor(last))
        cu_seqlens = torch.tensor(bounds + bounds[-1:] * empty, dtype=torch.int32)
        row = torch.from_numpy(np.stack([tokens, targets]))
        return Batch(row[:1], row[1:], cu_seqlens, self.data.bytes_per_token, carry)

    def _segments(self, epoch: int, step: int, stream: int) -> list[tuple[int, int, int]]:
        """(piece, tokens of it that came before, tokens of it here) of one stream's part of a row."""
        order, begins = self._line(epoch)
        first = (self.rank * self.streams + stream) * self.part
        low = first + step * self.step
        high = min(low + self.step, first + self.part, self.total)
        found = []
        j = int(np.searchsorted(begins, low, side="right")) - 1
        while low < high:
            stop = min(high, int(begins[j + 1]))
            found.append((int(order[j]), low - int(begins[j]), stop - low))
            low, j = stop, j + 1
        return found
