"""Runs the tests marked `unchecked` in a process without the run-time shape checks (conftest.py says why)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_all_tests_marked_unchecked():
    root = Path(__file__).parent
    marked = [str(file) for file in root.rglob("test_*.py") if "mark.unchecked" in file.read_text()]
    command = [Path(sys.executable).with_name("pytest"), "-p", "no:cacheprovider", "--durations=3", *marked]
    environment = os.environ | {"SUBQUAD_TEST_UNCHECKED": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:  # of the worker that runs this test
        del environment[name]
    done = subprocess.run(command, cwd=root.parent, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 10
