"""The time-invariant recurrence where it is a convolution: lengths past those that are stepped through."""

import pytest
import torch

from subquad.errors import UserError
from subquad.kernels.examples import differences, examples
from subquad.kernels.lti import FEW_LOW_RANK, lti


@pytest.mark.parametrize("time", [FEW_LOW_RANK + 1, 600])
def test_the_convolution_equals_the_recurrence(time):
    for example in examples("lti", time=time):
        errors = differences(example, "torch")
        assert all(x < 1e-10 for x in errors.values()), (example.name, errors)


def test_the_convolution_in_float32():
    for example in examples("lti", time=600, dtype=torch.float32):
        errors, unavoidable = differences(example, "torch"), differences(example, "naive")
        assert all(x <= max(1e-5, 3 * unavoidable[name]) for name, x in errors.items()), (example.name, errors)


def test_modes_that_are_gone_at_once_leave_finite_gradients():
    A = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    u, ones = torch.randn(1, 300, 2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    y, _ = lti(u, A, ones, ones)
    torch.testing.assert_close(y, 3 * u)
    (gradient,) = torch.autograd.grad(y.sum(), A)
    torch.testing.assert_close(gradient, u[0, :-1].sum(0)[:, None].expand(2, 3))


def test_what_cannot_be_meant_is_refused():
    u, A = torch.randn(1, 4, 2), torch.full((2, 3), 0.5)
    with pytest.raises(UserError, match="all real or all complex"):
        lti(u, A, A, A.to(torch.complex64))
    with pytest.raises(UserError, match="both P and Q"):
        lti(u, A, A, A, A)
