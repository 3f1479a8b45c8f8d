"""20,000 attacks end well or with one sentence (attacks.py); a few hundred of them in every run of the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def attacks(*words, **variables):
    """Counts by kind. In a process of its own, without the tests' checks of shapes and poisoned memory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, HERE / "attacks.py", *map(str, words)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row.get("kind", "all"): row for row in rows}


WITHOUT_TRAINING = (
    *("configuration as a dict", "configuration in YAML", "configuration in JSON", "config.json of a model"),
    *("weights", "weights with a flipped bit", "state", "token cache", "tokenizer", "command line"),
)


def test_some_attacks():
    counts = attacks("--kinds", *WITHOUT_TRAINING, "--count", 250)
    assert counts["all"]["cases"] >= 240 and "bad" not in counts["all"]


@pytest.mark.slow
def test_twenty_thousand_attacks():
    counts = attacks("--count", 20_000)
    print(json.dumps(counts, indent=2))
    assert counts["all"]["cases"] >= 20_000 and "bad" not in counts["all"]
    # A suite whose attacks all fail at the first check, or none of which is noticed, would show nothing.
    assert all(row["refused"] for row in counts.values())
    assert {name for name, row in counts.items() if not row.get("works")} == {"weights with a flipped bit"}


@pytest.mark.slow
def test_fifty_attacks_on_real_commands():
    kinds = ("state", "training checkpoint", "config.yaml of a run", "command line", "command line of train")
    counts = attacks("--kinds", *kinds, "--first", 0, "--count", 10, ATTACK_WITH_PROCESSES="1")
    assert counts["all"]["cases"] == 50 and "bad" not in counts["all"]
