"""Long sequences without gradients go piece by piece, to the same outputs and state."""

import pytest
import torch

from subquad.kernels import wrapping
from subquad.kernels.examples import examples, relative_error

OPS = ("linear_attention", "delta_rule", "dplr_rule")


@pytest.mark.parametrize("op", OPS)
def test_pieces_are_the_whole(op, monkeypatch):
    taken = []
    for example in examples(op, time=150):
        if example.cu_seqlens is None and example.options.get("causal", True):
            out, state = example.call()
            with monkeypatch.context() as patch, torch.no_grad():
                patch.setattr(wrapping, "PIECE", 64)
                kept = None if example.state is None else torch.utils._pytree.tree_map(torch.clone, example.state)
                pieces, last = example._replace(state=kept).call()
            taken.append(relative_error(pieces, out))
            if state is not None:
                for one, other in zip(*(torch.utils._pytree.tree_leaves(x) for x in (last, state)), strict=True):
                    taken.append(relative_error(one, other))
    assert taken
    assert max(taken) < 1e-12


def test_which_calls_go_in_pieces(monkeypatch):
    lengths = []

    def recurrence(x, gate, S, cu_seqlens):
        lengths.append(x.shape[1])
        return x + 1, S + 1

    monkeypatch.setattr(wrapping, "PIECE", 64)
    form, x, S = wrapping.in_pieces(recurrence, 2), torch.zeros(1, 150, 2), torch.zeros(1)
    with torch.no_grad():
        out, last = form(x, None, S, None)
        form(x, None, S, torch.tensor([0, 150]))
    form(x, None, S, None)
    assert lengths == [64, 64, 22, 150, 150]
    assert torch.equal(out, x + 1)
    assert float(last) == 3
