"""Tapes: a call whose layouts were met before does the same to other tensors."""

import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch

from subquad.kernels import blocked
from subquad.kernels.examples import examples, load_ops, run, run_in_place
from subquad.kernels.triton import configs, tape

pytestmark = pytest.mark.unchecked
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = sorted(op for op, forms in load_ops().items() if "triton" in forms)


def drawn(op, seed):
    """On the interpreter, which takes seconds for each, one that packs and carries; with the most options."""
    found = examples(op, time=3, dtype=torch.float32, device=DEVICE, seed=seed)
    found = [e for e in found if e.name.endswith((", fresh", ", packed, carried"))]
    return found if DEVICE == "cuda" else found[-1:]


@pytest.mark.parametrize("op", OPS)
def test_a_replayed_call_gives_what_a_new_one_gives(op):
    for example, other in zip(drawn(op, 1), drawn(op, 2), strict=True):
        for how in (run, run_in_place) if example.state is not None else (run,):
            with blocked.ignored():
                tape.forget()
                expected = how(example, "triton")
                how(other, "triton")
                tapes, failed = tape.counts()
                assert tapes and not failed
                replayed = how(example, "triton")
                assert tape.counts() == (tapes, 0)
            for name, value in expected.items():
                assert torch.equal(replayed[name], value), (example.name, name)


def test_a_tensor_from_outside_is_never_taken_for_one_of_the_call():
    kept = torch.ones(3, device=DEVICE)

    @tape.taped
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + kept

    for value in range(4):
        assert torch.equal(add(kept * value), kept * (value + 1))
    assert tape.counts() == (0, 1)


def test_what_depends_on_values_is_never_replayed():
    @tape.taped
    def halve(x: torch.Tensor) -> torch.Tensor:
        return x / 2 if x.sum().item() > 1 else x * 1

    for value in (0.0, 0.0, 0.0, 4.0):
        x = torch.full((3,), value, device=DEVICE)
        assert torch.equal(halve(x), x / 2)
    assert tape.counts() == (0, 1)


def test_a_tape_tells_two_tensors_apart_though_one_call_took_one_twice():
    @tape.taped
    def minus(x: torch.Tensor, y: torch.Tensor, times: int) -> tuple[torch.Tensor, torch.Tensor]:
        room = torch.empty_like(x)
        room.copy_(x)
        room -= y.sum(0, keepdim=True) * times
        return room, x[1:].contiguous()

    x, y = torch.arange(6.0, device=DEVICE).reshape(3, 2), torch.ones(3, 2, device=DEVICE)
    for first, second, times in ((x, x, 2), (x, x, 2), (x, x, 2), (x, y, 2), (x, y, 2), (y, x, 2), (x, y, 3)):
        for got, expected in zip(minus(first, second, times), (first - times * second.sum(0), first[1:]), strict=True):
            assert torch.equal(got, expected)
    assert tape.counts() == (1, 0)
    turned = x.t().contiguous().t()
    assert torch.equal(minus(turned, y, 2)[0], x - 6) and tape.counts() == (1, 0)


STORE = torch.arange(64.0)


@tape.taped
def answer(x: torch.Tensor, other: torch.Tensor | None, plus: float) -> torch.Tensor:
    """Of all that a call may depend on."""
    found = 2 * (torch.get_float32_matmul_precision() == "highest") + 4 * (x.data_ptr() % 16 == 0)
    found += 8 * (other is None) + 16 * x.stride(0) + 1000 * configs.config("step")["num_warps"]
    return x.new_full((1,), found + plus)


@contextmanager
def lower_precision():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_whatever_a_call_depends_on_has_a_tape_of_its_own():
    given = [
        (STORE[:4], None, 0.0), (STORE[1:5], None, 0.0), (STORE[:8:2], None, 0.0), (STORE[:4], STORE, 0.0),
        (STORE[:4], STORE, 0.5),
    ]  # fmt: skip
    blocks = {"BLOCK_V": 16, "num_warps": 8, "num_stages": 1}
    for how in (nullcontext, lower_precision, lambda: configs.forced("step", blocks), nullcontext):
        with how():
            for _ in range(3):
                assert [float(answer(*x)) for x in given] == [float(answer.__wrapped__(*x)) for x in given]
    assert tape.counts() == (20, 0)


def test_who_watches_sees_every_call(monkeypatch):
    for _ in range(3):
        answer(STORE, None, 0.0)
    for _ in range(2):
        with configs.recorded() as asked:
            answer(STORE, None, 0.0)
        assert [kernel for kernel, _ in asked] == ["step"]
    seen = []
    monkeypatch.setattr(configs, "config", lambda kernel: seen.append(kernel) or {"num_warps": 1})
    answer(STORE, None, 0.0)
    assert not seen
    monkeypatch.setattr(tape.triton.knobs.runtime.launch_exit_hook, "calls", [print])  # a profiler of launches
    answer(STORE, None, 0.0)
    assert seen == ["step"]


def test_room_is_given_back_where_it_was_last_read():
    x, seen, alive = torch.ones(5), [], []

    def multiply(t, factor):
        alive.append(sum(found() is not None for found in seen))
        seen.append(weakref.ref(out := t * factor))
        return out

    with tape.Tape([x]) as record:
        _ = x * 3  # read by nothing
        y = x * 2
        for _ in range(3):
            y = y * 2
    record.bound |= {name: multiply for name, x in record.bound.items() if x is torch.ops.aten.mul.Tensor}
    replay = record.replay(y)
    assert torch.equal(replay(x), 16 * x)
    assert alive == [0, 0, 1, 1, 1]  # the one that is read, and none of those before it


def test_only_so_many_tapes_are_kept(monkeypatch):
    monkeypatch.setattr(tape, "KEPT", 3)

    @tape.taped
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    for width in (1, 1, 2, 2, 3, 3, 1, 4, 4, 2, 1):
        assert torch.equal(double(torch.ones(width)), 2 * torch.ones(width))
    assert tape.counts() == (2, 0)
