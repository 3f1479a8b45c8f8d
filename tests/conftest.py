# ruff: noqa: E402
"""What holds for every test.

* Shapes: every jaxtyping annotation of subquad is checked at run time. The hook must be in place before subquad is
  first imported, so it is the first thing here. torch.compile cannot trace the wrappers it makes, not even switched
  off; a test that compiles is marked `unchecked` and runs in a process without the hook, which test_unchecked.py
  starts. By hand: SUBQUAD_TEST_UNCHECKED=1 pytest tests/models/test_compile.py
* Memory: `torch.empty` and its kin hand out NaN, so that an output an op forgot to write shows.
* Chance: each test starts from a seed made of its name, which a failure prints. SUBQUAD_TEST_SEED=n shifts them all.
* Threads: one, so that two workers do not fight over two cores.
"""

import os
import random
import zlib

import jaxtyping

UNCHECKED = os.environ.get("SUBQUAD_TEST_UNCHECKED") == "1"
if not UNCHECKED:
    # As for type checkers, an int may stand where a float is asked for.
    jaxtyping.install_import_hook("subquad", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import numpy as np
import pytest
import torch

SHIFT = int(os.environ.get("SUBQUAD_TEST_SEED", "0"))


def pytest_configure(config):
    torch.set_num_threads(1)


def seed_of(nodeid: str) -> int:
    return (zlib.crc32(nodeid.encode()) + SHIFT) % 2**32


@pytest.fixture(autouse=True)
def seeded(request):
    seed = seed_of(request.node.nodeid)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_collection_modifyitems(config, items):
    """Each process runs the tests that are made for it, those that start other processes first."""
    here = [item for item in items if (item.get_closest_marker("unchecked") is not None) == UNCHECKED]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(here)])
    items[:] = sorted(here, key=lambda item: "test_unchecked" not in item.nodeid)  # the longest first, for two workers


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """Uninitialised floating-point tensors hold NaN."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.is_floating_point() or out.is_complex():
                with torch.no_grad():
                    out.fill_(float("nan"))
            return out

        return wrapper

    with torch.device("meta"):
        torch.empty(0)  # `torch.device` as a context looks the factories up once: before they are wrapped
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed:
        report.sections.append(("seed", f"{seed_of(item.nodeid)} (SUBQUAD_TEST_SEED={SHIFT})"))
