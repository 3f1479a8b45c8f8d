"""Triton forms run on the GPU of their tensors, whichever is the current one."""

import pytest
import torch

from subquad.kernels.examples import examples, load_ops, relative_error, run, run_in_place

pytestmark = [
    pytest.mark.unchecked,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
OPS = [op for op, forms in sorted(load_ops().items()) if "triton" in forms]


@pytest.mark.parametrize("op", OPS)
def test_on_the_second_gpu_as_on_the_first(op):
    """Forward, backward and in place, from the second's own compilation."""
    for here, there in zip(*(examples(op, dtype=torch.float32, device=f"cuda:{n}") for n in (0, 1)), strict=True):
        for how in (run, run_in_place) if here.state is not None else (run,):
            expected, found = how(here, "triton"), how(there, "triton")
            for name, value in found.items():
                assert value.device == torch.device("cuda", 1), name
                assert relative_error(value.cpu(), expected[name].cpu()) < 1e-6, (here.name, name)
    assert torch.cuda.current_device() == 0
