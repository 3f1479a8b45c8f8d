"""Tests change what a launch depends on besides its tensors, which no tape may outlive."""

import pytest

from subquad.kernels.triton import tape


@pytest.fixture(autouse=True)
def no_tapes():
    tape.forget()
    yield
    tape.forget()
