"""States as values: every operation against doing the same with whole sequences."""

import resource
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from subquad.checksums import sealed
from subquad.errors import UserError
from subquad.infer import state as S
from subquad.kernels.state import Count, Pool, Recurrent, leaves
from subquad.layers import available
from subquad.models.lm import LM, BlockState, LMState

TOKENS = torch.tensor(
    [[7, 1, 200, 33, 64, 5, 90, 11, 2], [8, 250, 3, 3, 77, 12, 6, 1, 99], [4, 9, 8, 7, 6, 5, 4, 3, 1]]
)
AFTER = torch.tensor([[17, 40], [18, 41], [19, 42]])


@torch.no_grad()
def read(model, rows, state=None, room=32):
    state = model.init_state(len(rows), room) if state is None else state
    return model(rows, state)[1]


@torch.no_grad()
def logits(model, rows, state):
    return model(rows, state)[0]


@torch.no_grad()
def expected(model, rows, after=AFTER):
    """Scores of `after` when each sequence is read alone from its start."""
    return torch.cat([model(torch.cat([r, a])[None])[0][:, -len(a) :] for r, a in zip(rows, after, strict=True)])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_rewind_goes_back_exactly(model):
    state = read(model, TOKENS)
    mark = S.mark(state)
    before = [t.clone() for _, _, t in leaves(state)]
    first = logits(model, AFTER, state)
    state = S.rewind(state, mark)
    again = logits(model, AFTER, state)
    assert torch.equal(first, again)
    state = S.rewind(state, mark)
    for (path, kind, t), old in zip(leaves(state), before, strict=True):
        assert kind == "append" or torch.equal(t, old), path


def test_mark_copies_no_cache_that_only_grows(models):
    state = read(models["attention"], TOKENS)
    kinds = [kind for _, kind, _ in leaves(state)]
    assert [c is None for c in S.mark(state).copies] == [kind == "append" for kind in kinds]


def test_fork_gives_independent_copies(model):
    state = S.fork(read(model, TOKENS[:2]), 2)
    after = torch.tensor([[17, 40], [18, 41], [19, 42], [20, 43]])
    close(logits(model, after, state), expected(model, TOKENS[[0, 0, 1, 1]], after))


def test_select_reorders_and_repeats(model):
    state = S.select(read(model, TOKENS), [2, 0, 2])
    close(logits(model, AFTER, state), expected(model, TOKENS[[2, 0, 2]]))


def test_concatenate_joins_states_of_different_length_and_room(model):
    state = S.concatenate([read(model, TOKENS[:1, :4], room=11), read(model, TOKENS[1:], room=32)])
    wanted = torch.cat([expected(model, TOKENS[:1, :4], AFTER[:1]), expected(model, TOKENS[1:], AFTER[1:])])
    close(logits(model, AFTER, state), wanted)


def test_put_replaces_one_sequence_in_place(model):
    state = read(model, TOKENS)
    addresses = [t.data_ptr() for _, _, t in leaves(state)]
    others = [t[[0, 2]].clone() for _, _, t in leaves(state)]
    other = read(model, TOKENS[:1].flip(1), room=12)
    state = S.put(state, 1, other)
    assert [t.data_ptr() for _, _, t in leaves(state)] == addresses
    assert all(torch.equal(t[[0, 2]], old) for (_, _, t), old in zip(leaves(state), others, strict=True))
    rows = torch.stack([TOKENS[0], TOKENS[0].flip(0), TOKENS[2]])
    close(logits(model, AFTER, state), expected(model, rows))


def test_put_refuses_what_does_not_fit(models):
    model = models["attention"]
    with pytest.raises(UserError, match=r"put: blocks\.0\.mixer\.k is \(20, 2, 4\) a sequence, its slot \(12, 2, 4\)"):
        S.put(read(model, TOKENS, room=12), 0, read(model, TOKENS[:1], room=20))


def test_reset_empties_slots_in_place(model):
    state = read(model, TOKENS)
    addresses = [t.data_ptr() for _, _, t in leaves(state)]
    state = S.reset(state, [0, 2], model)
    assert [t.data_ptr() for _, _, t in leaves(state)] == addresses
    rows = [TOKENS[0, :0], TOKENS[1], TOKENS[2, :0]]
    close(logits(model, AFTER, state), expected(model, rows))


def test_reset_takes_the_initial_values_not_zeros():
    class MaxState(NamedTuple):
        m: Recurrent

    class Layer:
        def init_state(self, batch_size, max_len, dtype=None):
            return MaxState(torch.full((batch_size, 3), -7.0))

    state = S.reset(MaxState(torch.ones(2, 3)), 1, Layer())
    assert state.m.tolist() == [[1.0] * 3, [-7.0] * 3]


def test_nbytes_counts_the_tensors(models):
    linear = models["linear"].init_state(3, 1000)
    assert S.nbytes(linear) == 2 * 3 * 8 * (2 * 8 * 8 + 2 * 8)  # layers, sequences, float64, S and z of two heads
    attention = models["attention"]
    assert S.nbytes(attention.init_state(1, 2000)) - S.nbytes(attention.init_state(1, 1000)) == 2 * 2 * 8 * 1000 * 2 * 4


def test_detach_cuts_the_history(models):
    model = models["linear"]
    _, state = model(TOKENS, model.init_state(3, 9))
    assert any(t.requires_grad for _, _, t in leaves(state))
    values = [t.detach() for _, _, t in leaves(state)]
    cut = S.detach(state)
    assert not any(t.requires_grad for _, _, t in leaves(cut))
    assert all(torch.equal(t, v) for (_, _, t), v in zip(leaves(cut), values, strict=True))


def test_pages_that_sequences_share_are_not_moved():
    class Paged(NamedTuple):
        pages: Pool

    with pytest.raises(TypeError, match="pages is a pool"):
        S.fork(Paged(torch.zeros(4, 2)), 2)


def test_a_file_goes_on_with_more_room(model, tmp_path):
    state = read(model, TOKENS, room=9)
    wanted = expected(model, TOKENS)
    S.save_state(tmp_path / "s", model, state, extra={"note": torch.tensor([3])})
    loaded, extra = S.load_state(tmp_path / "s", model, room=lambda extra: 9 + int(extra["note"]))
    assert extra["note"].tolist() == [3]
    close(logits(model, AFTER, loaded), wanted)


def test_a_file_holds_only_what_is_filled(models, tmp_path):
    model = models["attention"]
    S.save_state(tmp_path / "s", model, read(model, TOKENS, room=5000))
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert file.get_slice("state.blocks.0.mixer.k").get_shape() == [3, 9, 2, 4]


@pytest.mark.parametrize("name", sorted(available()))
def test_every_layer_that_decodes(name, tmp_path):
    """Read 70 tokens, then go on after each operation, against reading everything alone. One model per layer."""
    model = LM.from_config({"d_model": 32, "blocks": [{"pattern": [{"mixer": name}]}]}).double().eval()
    if not hasattr(model.blocks[0].mixer, "init_state"):
        pytest.skip("reads the whole sequence at once")
    rows, after = torch.randint(256, (3, 70)), torch.randint(256, (3, 2))
    wanted = expected(model, rows, after)
    state = read(model, rows, room=80)
    mark = S.mark(state)
    close(logits(model, after, state), wanted)
    state = S.rewind(state, mark)
    S.save_state(tmp_path / "s", model, state)
    moved = S.concatenate([S.select(state, [2]), S.fork(S.select(state, [0]), 2)])
    close(logits(model, after, moved), expected(model, rows[[2, 0, 0]], after))
    loaded, _ = S.load_state(tmp_path / "s", model, room=lambda extra: 100)
    close(logits(model, after, loaded), wanted)
    state = S.reset(S.put(state, 0, S.select(state, [1])), 2, model)
    close(logits(model, after, state), expected(model, [rows[1], rows[1], rows[2, :0]], after))


class ComplexState(NamedTuple):
    h: Recurrent
    count: Count


class ComplexLM(LM):
    """A model whose state is complex128, which safetensors does not know."""

    def init_state(self, batch_size, max_len, dtype=None):
        h = torch.zeros(batch_size, 5, dtype=torch.complex128)
        return LMState((BlockState(ComplexState(h, torch.zeros(batch_size, dtype=torch.long)), ()),))


def test_complex_states_are_kept_to_the_last_bit(tmp_path):
    model = ComplexLM.from_config({"d_model": 4, "blocks": [{"pattern": [{"ffn": "MLP"}]}]})
    state = model.init_state(2, 1)
    state.blocks[0].mixer.h.copy_(torch.randn(2, 5, dtype=torch.complex128))
    S.save_state(tmp_path / "s", model, state)
    loaded, _ = S.load_state(tmp_path / "s", model)
    assert torch.equal(loaded.blocks[0].mixer.h, state.blocks[0].mixer.h)


def test_a_file_of_another_model_is_refused(models, small, tmp_path):
    S.save_state(tmp_path / "s", models["linear"], read(models["linear"], TOKENS))
    for other in (small("linear", seed=1), models["mamba2"]):
        with pytest.raises(UserError, match="belongs to another model"):
            S.load_state(tmp_path / "s", other)
    with pytest.raises(UserError, match=r"saved by a float64 model, this one is float32; load it as float64"):
        S.load_state(tmp_path / "s", small("linear").float())


def test_a_file_that_is_none_is_refused(models, tmp_path):
    model = models["linear"]
    whole, path = tmp_path / "whole", tmp_path / "s"
    S.save_state(whole, model, read(model, TOKENS))
    with pytest.raises(UserError, match="there is no state file"):
        S.load_state(path, model)
    data = whole.read_bytes()
    for damaged in (b"", b"hello", data[:100], data[:-50]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged or no state file"):
            S.load_state(path, model)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is no state file of subquad"):
        S.load_state(path, model)


def test_a_file_with_other_tensors_is_refused(models, tmp_path):
    model = models["linear"]
    S.save_state(tmp_path / "s", model, read(model, TOKENS))
    with safe_open(tmp_path / "s", framework="pt") as file:
        about = {k: v for k, v in file.metadata().items() if "crc32" not in k}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    gone = tensors.pop("state.blocks.1.mixer.S")
    save_file(tensors, tmp_path / "s", metadata=sealed(tensors, about))
    with pytest.raises(UserError, match=r"tensor 'state\.blocks\.1\.mixer\.S' is missing"):
        S.load_state(tmp_path / "s", model)
    tensors["state.blocks.1.mixer.S"] = gone[:, :1].contiguous()
    save_file(tensors, tmp_path / "s", metadata=sealed(tensors, about))
    with pytest.raises(UserError, match=r"blocks\.1\.mixer\.S is \(3, 1, 8, 8\), the model has \(3, 2, 8, 8\)"):
        S.load_state(tmp_path / "s", model)


@contextmanager
def files_no_larger_than(size):
    """What a full disk looks like to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_what_was_there(models, tmp_path):
    model = models["linear"]
    state = read(model, TOKENS)
    S.save_state(tmp_path / "s", model, state)
    before = (tmp_path / "s").read_bytes()
    with files_no_larger_than(1000), pytest.raises(UserError, match=r"cannot write .*/s: "):
        S.save_state(tmp_path / "s", model, state, overwrite=True)
    assert (tmp_path / "s").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_files_are_replaced_only_when_asked(models, tmp_path):
    model = models["linear"]
    state = read(model, TOKENS)
    S.save_state(tmp_path / "s", model, state)
    with pytest.raises(UserError, match="exists; pass overwrite"):
        S.save_state(tmp_path / "s", model, state)
    with pytest.raises(UserError, match="there is no folder"):
        S.save_state(tmp_path / "no" / "s", model, state)
    S.save_state(tmp_path / "s", model, state, overwrite=True)
