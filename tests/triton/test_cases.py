"""What `doctor` relies on: which kernels the cases of `compare kernels` use; all run where their tensors are."""

import pytest
import torch

from subquad.compare.kernel_cases import CASES, Sizes
from subquad.kernels import blocked
from subquad.kernels.examples import differences, examples, load_ops, relative_error, run, run_in_place
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", [op for op, forms in sorted(load_ops().items()) if "triton" in forms])
def test_on_the_second_gpu_as_on_the_first(op):
    """Forward, backward and in place, whichever GPU is the current one."""
    for here, there in zip(*(examples(op, dtype=torch.float32, device=f"cuda:{n}") for n in (0, 1)), strict=True):
        for how in (run, run_in_place) if here.state is not None else (run,):
            expected, found = how(here, "triton"), how(there, "triton")
            for name, value in found.items():
                assert value.device == torch.device("cuda", 1), name
                assert relative_error(value.cpu(), expected[name].cpu()) < 1e-6, (here.name, name)
    assert torch.cuda.current_device() == 0
