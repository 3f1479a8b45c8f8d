"""The loss of a model on documents, by how many tokens it had seen."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.errors import UserError
from subquad.infer.generate import encode
from subquad.infer.progress import Progress
from subquad.kernels.packing import cu_seqlens_of
from subquad.layers.base import device_of
from subquad.models.lm import LM
from subquad.models.tokenizer import Tokenizer

LOGITS_AT_ONCE = 2**22  # values; all logits of a call would take 2 GB with a vocabulary of 128 k


@dataclass(frozen=True)
class Losses:
    """bits[i] and tokens[i]: sums over the tokens predicted from 2^i .. 2^(i+1) - 1 tokens of context."""

    bits: list[float]
    tokens: list[int]
    n_bytes: int
    bytes_per_token: float
    context: int

    @property
    def total_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def bits_per_token(self) -> float:
        return sum(self.bits) / self.total_tokens

    @property
    def bits_per_byte(self) -> float:
        return self.bits_per_token / self.bytes_per_token

    @property
    def by_position(self) -> list[float]:
        """Bits per byte of each bucket; 0 for an empty one."""
        pairs = zip(self.bits, self.tokens, strict=True)
        return [bits / count / self.bytes_per_token if count else 0.0 for bits, count in pairs]


@torch.no_grad()
def measure(model: LM, tokenizer: Tokenizer, texts: Sequence[bytes], *, context: int, chunk: int) -> Losses:
    """Every token but the first of each text, predicted from the tokens before it in its window.

    A text is cut in windows of `context` predictions each; windows share no state. At most `chunk` tokens go through
    the model in one call: short windows packed together, a long one through its state.
    """
    model.init_state(1, 1)  # a layer that reads the whole sequence at once would see what it is to predict
    documents = [encode(tokenizer, text, model.config.vocab_size) for text in texts if text]
    predictions = sum(len(d) - 1 for d in documents)
    if not predictions:
        raise UserError("the data has nothing to predict; give at least one file of two tokens or more")
    device = device_of(model)
    n_buckets = context.bit_length()
    edges = 2 ** torch.arange(1, n_buckets, device=device)
    bits = torch.zeros(n_buckets, dtype=torch.float64, device=device)
    counts = torch.zeros(n_buckets, dtype=torch.int64, device=device)
    with Progress("evaluating", predictions) as progress:
        for group in _groups(_windows(documents, context), chunk):
            inputs, targets, position = (torch.cat(parts).to(device, torch.long) for parts in zip(*group, strict=True))
            packed = None
            if len(group) > 1:
                packed = cu_seqlens_of(torch.tensor([len(window[0]) for window in group], device=device))
            state = model.init_state(1, len(inputs)) if len(inputs) > chunk else None
            for start in range(0, len(inputs), chunk):
                part = slice(start, start + chunk)
                hidden, state, _ = model.hidden(inputs[None, part], state, packed)
                nats = _loss(model, hidden[0], targets[part])
                bucket = torch.bucketize(position[part] + 1, edges, right=True)
                bits.index_add_(0, bucket, nats.double() / log(2))
                counts += bucket.bincount(minlength=n_buckets)
                progress.advance(len(nats))
    n_bytes = sum(len(text) for text in texts)
    return Losses(bits.tolist(), counts.tolist(), n_bytes, n_bytes / sum(len(d) for d in documents), context)


def _windows(documents: Sequence[Tensor], context: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(inputs, targets, positions) of each window."""
    for tokens in documents:
        for start in range(0, len(tokens) - 1, context):
            inputs = tokens[start : min(start + context, len(tokens) - 1)]
            yield inputs, tokens[start + 1 : start + 1 + len(inputs)], torch.arange(len(inputs))


def _groups(windows: Iterator[tuple[Tensor, ...]], chunk: int) -> Iterator[list[tuple[Tensor, ...]]]:
    """Neighbouring windows that fit in `chunk` tokens together, and those that do not alone."""
    group: list[tuple[Tensor, ...]] = []
    size = 0
    for window in windows:
        if group and size + len(window[0]) > chunk:
            yield group
            group, size = [], 0
        group.append(window)
        size += len(window[0])
    if group:
        yield group


def _loss(model: LM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target, in float32 or wider; the head runs over a few rows at a time."""
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return torch.cat([F.cross_entropy(model.logits(h).to(dtype), t, reduction="none") for h, t in pairs])
