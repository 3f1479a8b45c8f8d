"""Packing: what is in a row, and that it is a pure function of seed and position."""

import itertools

import numpy as np
import pytest
import torch

from subquad.train.corpus import Tokens
from subquad.train.rows import IGNORED, Rows

LENGTHS = [5, 1, 130, 64, 17, 2, 65, 40, 3, 300]


@pytest.fixture
def data():
    """Documents whose tokens are all different, so that a token tells where it comes from."""
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    return Tokens(np.arange(starts[-1], dtype=np.uint32), starts, int(starts[-1]))


def document_of(data, token):
    return int(np.searchsorted(data.starts, token, side="right")) - 1


def sequences(batch):
    """(tokens, targets) of each sequence of a row that is not empty."""
    bounds = batch.cu_seqlens.tolist()
    return [
        (batch.tokens[0, a:b].tolist(), batch.targets[0, a:b].tolist()) for a, b in itertools.pairwise(bounds) if b > a
    ]


@pytest.mark.parametrize(("streams", "carry", "world"), [(1, False, 1), (4, True, 1), (1, False, 3), (2, True, 2)])
def test_an_epoch_covers_every_token_once(data, streams, carry, world):
    seen = []
    for rank in range(world):
        rows = Rows(data, context=64, row=96, streams=streams, carry=carry, seed=3, rank=rank, world=world)
        for position in range(rows.per_epoch, 2 * rows.per_epoch):
            seen += [token for tokens, _ in sequences(rows[position]) for token in tokens]
    assert sorted(seen) == list(range(sum(LENGTHS)))


def test_targets_stay_within_their_document(data):
    rows = Rows(data, context=64, row=96, seed=0)
    predicted = set()
    for position in range(rows.per_epoch):
        for tokens, targets in sequences(rows[position]):
            assert len({document_of(data, t) for t in tokens}) == 1, "a sequence holds one document"
            assert len(tokens) <= 64
            for token, target in zip(tokens, targets, strict=True):
                last = token + 1 == data.starts[document_of(data, token) + 1]
                assert target == (IGNORED if last else token + 1)
                predicted.add(target)
    firsts = set(data.starts[:-1].tolist())
    assert predicted - {IGNORED} == set(range(sum(LENGTHS))) - firsts, "every token but a document's first is predicted"


def test_order_is_a_function_of_seed_and_position(data):
    one, two = (Rows(data, context=64, row=96, seed=5) for _ in range(2))
    order = [9, 0, 4, 13, 4, 1]
    for position in order:
        assert torch.equal(one[position].tokens, two[position].tokens)
        assert torch.equal(one[position].cu_seqlens, two[position].cu_seqlens)
        two[0]  # what was read before does not matter
    epochs = [[one[e * one.per_epoch + i].tokens for i in range(one.per_epoch)] for e in range(2)]
    assert any(not torch.equal(a, b) for a, b in zip(*epochs, strict=True)), "each epoch has its own order"
    other = Rows(data, context=64, row=96, seed=6)
    assert any(not torch.equal(one[i].tokens, other[i].tokens) for i in range(one.per_epoch))


def test_shapes_are_static_and_few(data):
    rows = Rows(data, context=64, row=96, seed=0)
    batches = [rows[i] for i in range(3 * rows.per_epoch)]
    assert {b.tokens.shape for b in batches} == {(1, 96)}
    counts = {len(b.cu_seqlens) - 1 for b in batches}
    assert all(c & (c - 1) == 0 for c in counts), "the number of sequences is a power of two"


def test_streams_go_on_where_they_stopped(data):
    rows = Rows(data, context=64, row=96, streams=4, carry=True, seed=1)
    ends = {}
    for position in range(2 * rows.per_epoch):
        batch = rows[position]
        bounds, carry = batch.cu_seqlens.tolist(), batch.carry
        for m, (a, b) in enumerate(itertools.pairwise(bounds)):
            stream = int(carry.stream[m])
            if carry.continues[m]:
                assert int(batch.tokens[0, a]) == ends[stream] + 1
                assert document_of(data, ends[stream]) == document_of(data, ends[stream] + 1)
            if b > a:
                ends[stream] = int(batch.tokens[0, b - 1])
        for stream, m in enumerate(carry.last.tolist()):
            if bounds[m + 1] > bounds[m] and int(carry.stream[m]) == stream:
                assert int(batch.tokens[0, bounds[m + 1] - 1]) == ends[stream]
