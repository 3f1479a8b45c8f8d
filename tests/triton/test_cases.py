"""Which kernels of the table the cases of `compare kernels` use, as `doctor` relies on."""

import pytest
import torch

from subquad.compare.kernel_cases import CASES, Sizes
from subquad.kernels import blocked
from subquad.kernels.examples import differences, run
from subquad.kernels.triton import configs

pytestmark = pytest.mark.unchecked
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_uses_the_kernels_it_names(case):
    example = case.example(Sizes(1, 9, 2, 16), torch.float32, DEVICE)
    with configs.recorded() as launched, blocked.ignored():
        run(example, "triton")
    sizes = ("K", "V", "size", "levels")
    assert all(case.kernels[name] == {n: x for n, x in widths.items() if n not in sizes} for name, widths in launched)
    assert {name for name, _ in launched} == set(case.kernels)


@pytest.mark.skipif(DEVICE == "cpu", reason="a GPU's shared memory is what may not suffice")
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-4), (torch.float16, 2e-2)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wide_heads_fit_in_every_precision(case, dtype, bar):
    example = case.example(Sizes(1, 70, 2, 128), dtype, DEVICE)
    with blocked.ignored():
        errors = differences(example, "triton")
    assert all(x < bar for x in errors.values()), errors
