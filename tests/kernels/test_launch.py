"""Launching: which compiled kernel runs for which arguments."""

import random
from contextlib import nullcontext
from threading import Barrier
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from subquad.kernels.triton.launch import Kernel, same_hash, settle, side_by_side, specialization  # noqa: E402
from subquad.kernels.triton.tape import Tape  # noqa: E402


def _add(x, x_t, T, y, scale, WIDTH, BLOCK=1):
    pass


_add.__annotations__ = dict.fromkeys(("WIDTH", "BLOCK"), triton.language.constexpr)
STORE = torch.zeros(4096, dtype=torch.uint8)


@pytest.fixture
def jitted():
    jit = triton.JITFunction(_add, do_not_specialize=["T"])
    jit.calls = []

    def run(*arguments, grid, warmup, **options):
        number = len(jit.calls)
        jit.calls.append(options)
        return Compiled(number)

    jit.run = run
    return jit


class Compiled:
    launches: ClassVar[list] = []

    function, packed_metadata = "function", "metadata"

    def __init__(self, number):
        self.number = number

    def run(self, x, y, z, stream, function, metadata, told, before, after, *arguments):
        assert (stream, function, metadata, told, before, after) == (7, "function", "metadata", None, None, None)
        Compiled.launches.append((self.number, (x, y, z), arguments))

    def __getitem__(self, grid):
        return lambda *arguments: Compiled.launches.append((self.number, grid, ("hooked", *arguments)))


@pytest.fixture(autouse=True)
def one_stream(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)


def tensor(offset, dtype=torch.float32):
    return STORE[offset : offset + 64].view(dtype)


def arguments(r):
    size = r.choice([1, 2, 16, 17, 48, 2**31, 2**31 + 16, 0])
    dtype = r.choice([torch.float32, torch.bfloat16])
    y = r.choice([None, tensor(r.choice([0, 8, 16]))])
    return tensor(r.choice([0, 16, 32, 8]), dtype), size, r.choice([1, 7, 16, 2**40]), y, r.choice([0, 1, 5])


def test_one_key_never_stands_for_two_compilations(jitted):
    r = random.Random(0)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(jitted.signature, jitted.params, backend)
    key, seen = None, {}
    for _ in range(3000):
        given = arguments(r)
        key = key or specialization(jitted, given)
        _, special, _ = bind(*given, WIDTH=1)
        assert seen.setdefault(key(*given), special) == special
    compilations = {str(special) for special in seen.values()}
    assert 100 < len(compilations) <= len(seen) <= 2 * len(compilations)


def test_a_known_key_launches_its_kernel(jitted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # as the index of a tensor that is on no GPU
    monkeypatch.setattr(Compiled, "launches", launches := [])
    launched = Kernel(jitted)
    for T in (5, 6):
        launched[(T,)](tensor(0), 64, T, None, 1, WIDTH=8, BLOCK=4, num_warps=2)
    assert jitted.calls == [{"WIDTH": 8, "BLOCK": 4, "num_warps": 2}]
    ((number, grid, given),) = launches
    assert number == 0 and grid == (6, 1, 1)
    assert given[1:] == (64, 6, None, 1, 8, 4)

    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])  # as a profiler does
        launched[(6,)](tensor(0), 64, 6, None, 1, WIDTH=8, BLOCK=4, num_warps=2)
    number, grid, (told, _, *rest) = launches.pop()
    assert (number, grid, told, tuple(rest)) == (0, (6, 1, 1), "hooked", given[1:])

    for options in ({"WIDTH": 8, "BLOCK": 4, "num_warps": 4}, {"WIDTH": 4, "BLOCK": 8, "num_warps": 2}):
        launched[(1,)](tensor(0), 64, 1, None, 1, **options)
    launched[(1,)](tensor(8), 64, 1, None, 1, WIDTH=8, BLOCK=4, num_warps=2)
    assert len(jitted.calls) == 4 and len(launches) == 1


def test_a_tape_launches_with_the_addresses_of_other_tensors(jitted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(Compiled, "launches", launches := [])
    launched, options = Kernel(jitted), {"WIDTH": 8, "BLOCK": 4, "num_warps": 2}
    x = tensor(0)
    with Tape([x]) as tape:
        launched[(3,)](x, 64, 3, None, 1, **options)
        launched[(4, 2)](x, 64, 5, x, 1, **options)
    replay, other = tape.replay(None), tensor(64)
    launches.clear()
    replay(other)
    at = other.data_ptr()
    assert launches == [(0, (3, 1, 1), (at, 64, 3, None, 1, 8, 4)), (1, (4, 2, 1), (at, 64, 5, at, 1, 8, 4))]


LIMIT = triton.language.constexpr(3)


@triton.jit
def _inner(x):
    return x + LIMIT


@triton.jit
def _outer(x):
    return _inner(x)


@pytest.mark.skipif(not isinstance(_outer, triton.JITFunction), reason="the interpreter compiles nothing")
def test_what_a_kernel_calls_is_hashed_before_it(monkeypatch):
    hashed, order = triton.JITFunction.cache_key, []
    monkeypatch.setattr(triton.JITFunction, "cache_key", property(lambda f: order.append(f.__name__) or hashed.fget(f)))
    _inner.hash = _outer.hash = None
    same_hash(_outer)
    assert order[:2] == ["_inner", "_outer"]


@pytest.fixture
def anywhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())


def launches_of(monkeypatch):
    monkeypatch.setattr(Compiled, "launches", launches := [])
    return launches


def test_what_is_new_compiles_side_by_side_and_launches_in_order(jitted, anywhere, monkeypatch):
    launches = launches_of(monkeypatch)
    both = Barrier(2, timeout=60)
    jitted.warmup = lambda *given, grid, **options: both.wait()  # passes when two are there
    launched = Kernel(jitted)
    triton_run = jitted.run

    def run(*given, grid, warmup, **options):  # Triton's own launch is the first of each
        launches.append((None, grid, ()))
        return triton_run(*given, grid=grid, warmup=warmup, **options)

    jitted.run = run
    launched[(9,)](tensor(0), 64, 1, None, 1, WIDTH=4, BLOCK=4)
    for _ in range(2):
        with side_by_side():
            for i, width in enumerate([4, 8, 4, 16, 8]):
                launched[(i,)](tensor(0), 64, 1, None, 1, WIDTH=width, BLOCK=4)
    assert [options["WIDTH"] for options in jitted.calls] == [4, 8, 16]
    assert [grid[0] for _, grid, _ in launches] == [9, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_what_waits_is_launched_before_it_is_read(jitted, anywhere, monkeypatch):
    launches_of(monkeypatch)
    jitted.warmup = lambda *given, grid, **options: None
    launched = Kernel(jitted)
    settle()  # nothing waits
    with side_by_side():
        with side_by_side():
            launched[(1,)](tensor(0), 64, 1, None, 1, WIDTH=8, BLOCK=4)
        assert not jitted.calls
        settle()
        assert len(jitted.calls) == 1
        launched[(1,)](tensor(0), 64, 1, None, 1, WIDTH=4, BLOCK=4)
        assert len(jitted.calls) == 1
    assert len(jitted.calls) == 2


def test_a_failure_leaves_nothing_waiting(jitted, anywhere, monkeypatch):
    launches_of(monkeypatch)
    launched = Kernel(jitted)
    with pytest.raises(KeyError), side_by_side():
        launched[(1,)](tensor(0), 64, 1, None, 1, WIDTH=8, BLOCK=4)
        raise KeyError
    launched[(1,)](tensor(0), 64, 1, None, 1, WIDTH=4, BLOCK=4)
    assert [options["WIDTH"] for options in jitted.calls] == [4]


def test_kernels_run_where_their_tensors_are(jitted, monkeypatch):
    where = [0]

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            where.append(self.index)

        def __exit__(self, *_):
            where.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: where[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(Compiled, "launches", [])
    devices = []
    jitted.run = lambda *given, **options: devices.append(where[-1]) or Compiled(len(devices))
    launched = Kernel(jitted)
    for index in (1, 0, 1):
        x = SimpleNamespace(device=Device(index), dtype=torch.float32, data_ptr=lambda: 0)
        launched[(1,)](x, 1, 1, None, 1, WIDTH=8, BLOCK=1)
    assert devices == [1, 0] and where == [0]


def test_a_bool_is_refused(jitted):
    with pytest.raises(TypeError, match="scale is a bool"):
        specialization(jitted, (tensor(0), 1, 1, None, True))
