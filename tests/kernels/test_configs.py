"""The rule that chooses a kernel's launch values, and the user's table before the shipped one."""

import json

import pytest
import torch

from subquad.errors import UserError
from subquad.kernels.triton import configs
from subquad.kernels.triton.configs import Entry, Kernel, config

GPU = torch.device("cuda", 0)
HERE, ELSEWHERE = (9, 0), (8, 0)


def entry(capability, K, V, mark):
    return Entry(capability, {"K": K, "V": V}, {"BLOCK": mark})


TABLE = {
    "some": Kernel(
        default={"BLOCK": 0},
        candidates={"BLOCK": (16, 32), "num_warps": (4, 8)},
        entries=(
            entry(HERE, 64, 64, 1),
            entry(HERE, 128, 128, 2),
            entry(HERE, 64, 256, 3),
            entry(ELSEWHERE, 32, 32, 4),
        ),
    )
}


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "SHIPPED", TABLE)
    monkeypatch.setattr(configs, "_capability", lambda index: HERE)
    configs.path().parent.mkdir()
    configs.forget()
    yield
    monkeypatch.undo()
    configs.forget()


def chosen(**widths):
    return config("some", device=GPU, **widths)["BLOCK"]


@pytest.mark.parametrize(
    ("K", "V", "mark"),
    [
        (64, 64, 1),  # exactly
        (128, 128, 2),
        (64, 256, 3),
        (16, 48, 1),  # the smallest at or above in every width
        (65, 64, 2),
        (64, 129, 3),
        (128, 256, 0),  # nothing is at or above
        (256, 16, 0),
    ],
)
def test_the_rule(K, V, mark):
    assert chosen(K=K, V=V) == mark


def test_entries_are_for_one_kind_of_gpu(monkeypatch):
    monkeypatch.setattr(configs, "_capability", lambda index: ELSEWHERE)
    configs.forget()
    assert chosen(K=32, V=32) == 4
    assert chosen(K=64, V=64) == 0
    assert config("some", K=64, V=64)["BLOCK"] == 0, "without a GPU the default"
    assert config("some", device=torch.device("cpu"), K=64, V=64)["BLOCK"] == 0


def test_a_width_that_an_entry_leaves_out_may_be_anything(monkeypatch):
    entries = (Entry(HERE, {"K": 64, "itemsize": 2}, {"BLOCK": 7}), Entry(HERE, {"K": 64}, {"BLOCK": 8}))
    monkeypatch.setattr(configs, "SHIPPED", {"some": TABLE["some"]._replace(entries=entries)})
    configs.forget()
    assert chosen(K=64, itemsize=4) == 8
    assert chosen(K=64, itemsize=2, V=999) == 8, "the entry that is smaller in product"
    assert chosen(V=64) == 0, "an entry for a width that is not given does not fit"


def test_the_users_table_wins():
    mine = {"some": [entry(HERE, 64, 64, 9), entry(HERE, 32, 32, 10)], "of another version": [entry(HERE, 1, 1, 1)]}
    configs.path().write_text(configs.text(mine))
    configs.forget()
    assert [chosen(K=width, V=width) for width in (16, 32, 33, 64, 128)] == [10, 10, 9, 9, 2]


@pytest.mark.parametrize(
    ("values", "mark"), [({"BLOCK_OLD": 3}, 1), ({"BLOCK": 3, "OLD": 3}, 1), ({"BLOCK": 3, "maxnreg": 168}, 3)]
)
def test_an_entry_with_other_values_than_the_kernel_takes_is_left_out(values, mark):
    configs.path().write_text(configs.text({"some": [Entry(HERE, {"K": 64, "V": 64}, values)]}))
    configs.forget()
    assert chosen(K=64, V=64) == mark


def test_the_text_of_a_table_reads_back():
    mine = {"some": [entry(HERE, 64, 64, 9), entry(ELSEWHERE, 8, 16, 2)], "none": []}
    configs.path().write_text(configs.text(mine))
    assert configs.read(configs.path()) == mine


@pytest.mark.parametrize("text", ["{", "[]", '{"some": [{"widths": {}}]}'])
def test_a_damaged_table_is_an_error(text):
    configs.path().write_text(text)
    configs.forget()
    with pytest.raises(UserError, match=r"kernels\.json, the table of tuned kernels, is damaged"):
        chosen(K=64, V=64)


def test_forced_and_recorded():
    with configs.recorded() as calls:
        with configs.forced("some", {"BLOCK": 5}):
            assert chosen(K=1, V=2) == 5
        assert chosen(K=1, V=2) == 1
        chosen(K=64, V=64)
    assert calls == [("some", {"K": 1, "V": 2}), ("some", {"K": 64, "V": 64})]
    assert [c["BLOCK"] * c["num_warps"] for c in configs.candidates("some")] == [64, 128, 128, 256]


def test_what_comes_back_is_the_callers_own():
    config("some", device=GPU, K=64, V=64)["BLOCK"] = 99
    assert chosen(K=64, V=64) == 1


def test_the_shipped_table_is_consistent(monkeypatch):
    monkeypatch.undo()
    for name, kernel in configs.SHIPPED.items():
        assert set(kernel.candidates) == set(kernel.default), name
        for found in kernel.entries:
            assert set(found.values) - configs.OPTIONAL == set(kernel.default), name
            assert all(found.values[key] in kernel.candidates[key] for key in kernel.default), name
        json.dumps(kernel.entries)
