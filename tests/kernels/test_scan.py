"""The vectorised scan goes over long sequences in pieces that stay in the cache."""

import pytest
import torch

from subquad.kernels import scan as module
from subquad.kernels.backend import backend
from subquad.kernels.scan import scan


@pytest.mark.parametrize("shape", [(1, 1000, 7), (3, 391, 5, 2), (2, 130, 4), (2, 1000, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_pieces_are_the_recurrence(shape, dtype, monkeypatch):
    monkeypatch.setattr(module, "CACHED", 4096)
    split = []
    rows = module._rows
    monkeypatch.setattr(module, "_rows", lambda *arguments: split.append(1) or rows(*arguments))
    inputs = [(0.99 * torch.rand(shape, dtype=torch.float64)).to(dtype), torch.randn(shape, dtype=dtype)]
    inputs = [x.requires_grad_() for x in (*inputs, torch.randn(shape[0], *shape[2:], dtype=dtype))]
    found = []
    for form in ("torch", "naive"):
        with backend(form):
            h, last = scan(inputs[0], inputs[1], state=inputs[2])
        upstream = [torch.ones_like(last), torch.linspace(-1, 1, h.numel(), dtype=torch.float64).view_as(h).to(dtype)]
        found.append([h, last, *torch.autograd.grad([last, h], inputs, upstream)])
    assert len(split) > 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
