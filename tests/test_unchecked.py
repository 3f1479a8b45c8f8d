"""Runs the tests marked `unchecked` in processes without the run-time shape checks (conftest.py says why).

Those of the Triton kernels run on the GPU if there is one, else under Triton's interpreter, which has to be chosen
before triton is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
MARKED = [file for file in sorted(TESTS.rglob("test_*.py")) if "mark.unchecked" in file.read_text()]


@pytest.mark.parametrize("file", [str(f.relative_to(TESTS)) for f in MARKED if f != Path(__file__)])
def test_the_unchecked_tests_of(file):
    command = [Path(sys.executable).with_name("pytest"), "-p", "no:cacheprovider", "--durations=5", TESTS / file]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # the worker's
    environment["SUBQUAD_TEST_UNCHECKED"] = "1"
    if file.startswith("triton") and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=1200)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("all of its tests are marked slow")
    if done.returncode:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 1
