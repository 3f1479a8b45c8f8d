"""Claims of `subquad compare recall`: shipped configurations, verdicts on made-up runs, files, runs side by side."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from subquad import cli, configs
from subquad.compare import recall_runs
from subquad.compare.recall_claims import Claim, Point, gather, markdown
from subquad.compare.recall_experiment import experiment, rate
from subquad.models.lm import LM

SHIPPED = configs.names("recall")


def test_the_shipped_configurations_hold_the_five_claims():
    assert SHIPPED == ["attention", "delta_rule", "state_size", "state_tracking", "window"]
    assert not [name for name in configs.names() if "recall" in name], "they are no models' configurations"


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_configuration_trains(name, monkeypatch):
    monkeypatch.setattr(recall_runs, "EXAMPLES", 4)
    one = experiment({"steps": 2, "batch": 2, "seeds": 1}, {}, name)
    assert one.claim is not None and experiment({}, {}, name).settings["seeds"] == 3
    done = {}
    for tag, run in one.runs:
        if tag not in done:  # the other runs of a line differ in sizes, and experiment() built them all
            done[tag] = run | recall_runs.perform(run, torch.device("cpu"), lambda: None)
    lines = gather(list(done.items()), one.claim.x)
    assert all(lines[tag] for tag in done)


def test_delta_rule_and_linear_attention_have_the_same_state():
    runs = experiment({}, {}, "delta_rule").runs[::3]
    sizes = [recall_runs.state_bytes(LM.from_config(recall_runs.model_config(run)), 48) for _, run in runs]
    assert all(delta <= linear <= 1.05 * delta for delta, linear in zip(sizes[:3], sizes[3:], strict=True))


def line(*means, spread=0.0, xs=(1, 2, 4, 8)):
    return [Point(x, m, m - spread, m + spread, 3) for x, m in zip(xs, means, strict=False)]


@pytest.mark.parametrize(
    ("test", "lines", "agrees", "found"),
    [
        ({"name": "solves", "layers": ["a"]}, {"a": line(1, 0.995), "b": line(1, 0.4)}, True, "b: 100 % at 1, 40 % at"),
        (
            {"name": "solves", "layers": ["a", "b"]},
            {"a": line(1, 1), "b": line(1, 0.4)},
            False,
            "40 % on average",
        ),
        ({"name": "solves", "layers": ["a"]}, {"a": line(1, 1), "b": line(0.4, 1)}, False, "b: 40 % at 1, 100 % at 2"),
        ({"name": "grows", "layers": ["a"]}, {"a": line(0.1, 0.5, 0.9, spread=0.05)}, True, "10 % (5-15) at 1, 90 %"),
        ({"name": "grows", "layers": ["a"]}, {"a": line(0.1, 0.5, 0.4, 0.9)}, False, "90 % at 8"),
        ({"name": "grows", "layers": ["a"]}, {"a": line(0.4, 0.5, spread=0.1)}, False, "40 % (30-50) at 1"),
        (
            {"name": "beats", "better": "a", "worse": "b"},
            {"a": line(0.9, 1), "b": line(0.3, 1)},
            True,
            "90 % (1) to 30",
        ),
        ({"name": "beats", "better": "a", "worse": "b"}, {"a": line(0.9, 0.8), "b": line(0.3, 0.9)}, False, "80 % (2)"),
        ({"name": "beats", "better": "a", "worse": "b"}, {"a": line(1, 1), "b": line(1, 1)}, False, "100 % (2) to 100"),
        ({"name": "extrapolates", "solve": ["a"], "fail": ["b"]}, {"a": line(1, 1), "b": line(1, 0.5)}, True, "b: 100"),
        (
            {"name": "extrapolates", "solve": ["a"], "fail": ["b"]},
            {"a": line(1, 0.9), "b": line(1, 0.5)},
            False,
            "90 %",
        ),
        ({"name": "extrapolates", "solve": ["a"], "fail": ["b"]}, {"a": line(1, 1), "b": line(1, 0.8)}, False, "80 %"),
        (
            {"name": "windows", "full": ["a"], "reach": {"b": 3}},
            {"a": line(1, 1, 1, 1), "b": line(1, 1, 0.8, 0.1)},
            True,
            "b: at least 100 % below 3, at most 10 % past it",
        ),
        (
            {"name": "windows", "full": ["a"], "reach": {"b": 3}},
            {"a": line(1, 1, 1, 1), "b": line(1, 1, 0.8, 0.6)},
            False,
            "at most 60 % past it",
        ),
        (
            {"name": "windows", "full": ["a"], "reach": {"b": 3}},
            {"a": line(1, 1, 1, 0.9), "b": line(1, 1, 0.8, 0.1)},
            False,
            "a: at least 90 %, at 8",
        ),
    ],
)
def test_verdicts(test, lines, agrees, found):
    verdict = Claim("made-up", "It is so", "Someone 2020", "length", test).judge(lines)
    assert verdict.agrees is agrees
    assert found in verdict.found
    text = markdown([verdict])
    assert ("**disagrees**" in text) is not agrees and "mean and range of 3 seeds" in text and found in text


def test_lines_gather_the_seeds_of_each_point():
    def row(accuracy, **others):
        common = {"task": {"name": "needle", "length": 8}, "lengths": [8, 16], "variants": [], "state_bytes": 100}
        return common | {"accuracy": accuracy, "accuracy_of_variants": []} | others

    rows = [("a", row([1.0, 0.5])), ("a", row([0.5, None])), ("b", row([0.25, 0.25], state_bytes=None))]
    assert gather(rows, "length") == {
        "a": [Point(8, 0.75, 0.5, 1.0, 2), Point(16, 0.5, 0.5, 0.5, 1)],
        "b": [Point(8, 0.25, 0.25, 0.25, 1), Point(16, 0.25, 0.25, 0.25, 1)],
    }
    assert gather(rows, "state_bytes") == {"a": [Point(100, 0.75, 0.5, 1.0, 2)], "b": []}
    near = row([1.0, 1.0], variants=[{"distance": 2}, {"distance": 4}], accuracy_of_variants=[1.0, 0.5])
    assert [(p.x, p.mean) for p in gather([("a", near)], "distance")["a"]] == [(2, 1.0), (4, 0.5)]


CLAIM = {
    "says": "Attention counts past its window",
    "paper": "nobody",
    "x": "length",
    "test": {"name": "extrapolates", "solve": ["window"], "fail": ["LinearAttention"]},
}
CONFIG = {
    "claim": CLAIM,
    "tasks": [{"name": "parity", "length": 4}],
    "layers": {"window": {"name": "Attention", "window": 2}, "LinearAttention": "LinearAttention"},
    "d_model": 16,
    "blocks": 1,
    "steps": 2,
    "batch": 2,
    "lr": {"Attention": 1e-3, "others": "3e-3"},
    "seeds": 2,
    "shortest": 2,
    "beyond": [2],
}


def write(path, **changes):
    path.write_text(yaml.safe_dump(CONFIG | changes, sort_keys=False))
    return str(path)


def test_figures_and_verdicts_are_drawn_again_from_the_results(tmp_path, capsys, monkeypatch):
    config, first, again = write(tmp_path / "own.yaml"), tmp_path / "first", tmp_path / "again"
    assert cli.main(["compare", "recall", "--config", config, "--device", "cpu", "--out", str(first)]) == 0
    shown = capsys.readouterr().out
    assert "Attention counts past its window: DISAGREES" in shown
    results = first / "results.jsonl"
    runs = [json.loads(text) for text in results.read_text().splitlines()]
    assert [(run["lr"], run["seed"]) for run in runs] == [(1e-3, 0), (1e-3, 1), (3e-3, 0), (3e-3, 1)]

    monkeypatch.setattr(recall_runs, "perform", lambda *rest: pytest.fail("trained"))
    drawn = ["compare", "recall", "--config", config, "--results", str(results), "--out", str(again)]
    assert cli.main(drawn) == 0
    assert capsys.readouterr().out == shown
    for name in ("own.png", "own.svg", "claims.md"):
        assert (again / name).read_bytes() == (first / name).read_bytes()
    assert "<svg" in (again / "own.svg").read_text() and (again / "own.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(drawn) == 2
    assert "own.png exists" in capsys.readouterr().err
    results.write_text("\n".join(results.read_text().splitlines()[:3]) + "\n")
    assert cli.main([*drawn, "--overwrite"]) == 2
    assert "lacks 1 of 4 runs, such as parity, LinearAttention, seed 1" in capsys.readouterr().err


BROKEN = """
import os
from subquad.layers import LinearAttention

class Raises(LinearAttention):
    def forward(self, *args, **kwargs):
        raise RuntimeError("out of order")

class Dies(LinearAttention):
    def forward(self, *args, **kwargs):
        os._exit(3)
"""


def test_runs_side_by_side_and_one_that_fails_takes_no_other_with_it(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = ["compare", "recall", "--tasks", "{name: parity, length: 4}", "--seeds", "1", "--beyond", "--d-model", "16"]
    given += ["--blocks", "1", "--steps", "2", "--batch", "2", "--device", "cpu", "--workers", "3", "--out", "out"]
    assert cli.main([*given, "--layers", "broken.Raises", "broken.Dies", "LinearAttention"]) == 1
    said = capfd.readouterr().err
    assert "failed: parity, broken.Raises, seed 0: RuntimeError: out of order" in said
    assert "failed: parity, broken.Dies, seed 0: its process ended with code 3" in said
    found = {run["mixer"]: run["found"] for run in map(json.loads, Path("out/results.jsonl").read_text().splitlines())}
    assert set(found) == {"LinearAttention"}
    os.rename("out/results.jsonl", "out/aside.jsonl")
    assert cli.main([*given[:-4], "--out", "out", "--layers", "LinearAttention"]) == 0
    (alone,) = map(json.loads, Path("out/results.jsonl").read_text().splitlines())
    assert alone["found"] == found["LinearAttention"], "a run depends on where it runs"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer": []}, "unknown key 'layer'; did you mean 'layers'?"),
        ({"steps": 0}, "own.yaml: steps is 0; it must be at least 1"),
        ({"steps": "many"}, "own.yaml: steps is 'many' (str); it must be int"),
        ({"shortest": 9}, "own.yaml: shortest is 9; parity needs 1 to 4"),
        ({"lr": {"Attention": 0.1}}, "own.yaml: lr has neither 'LinearAttention' nor 'others'"),
        ({"lr": [1]}, "own.yaml: lr is [1]; it must be a number, or a mapping of layers to numbers"),
        ({"variants": [{"distance": 2}]}, "own.yaml: variants (parity): unknown key 'distance'"),
        ({"claim": CLAIM | {"test": {"name": "solve"}}}, "there is no test 'solve'; did you mean 'solves'?"),
        ({"claim": CLAIM | {"test": {"name": "solves"}}}, "claim.test has no 'layers'"),
        (
            {"claim": CLAIM | {"test": {"name": "solves", "layers": ["windw"]}}},
            "labelled 'windw'; did you mean",
        ),
        ({"claim": {"says": "It is so"}}, "claim has no 'paper'; it needs says, paper, x and test"),
        ({"claim": CLAIM | {"x": "lenght"}}, "claim.x is 'lenght'; did you mean 'length'?"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, capsys, changes, said):
    config = write(tmp_path / "own.yaml", **changes)
    assert cli.main(["compare", "recall", "--config", config, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_configuration_or_rate(tmp_path, capsys):
    assert cli.main(["compare", "recall", "--config", "windw", "--out", str(tmp_path / "out")]) == 2
    assert "'windw' is no shipped configuration or file; did you mean 'window'?" in capsys.readouterr().err
    assert cli.main(["compare", "recall", "--config", "window", "--claims", "--out", str(tmp_path / "out")]) == 2
    assert "give it or --config" in capsys.readouterr().err
    assert rate("--lr", {"Mamba2": "1e-2", "others": 0.1}, {"name": "Mamba2"}) == 0.01
    assert rate("--lr", {"Mamba2": "1e-2", "others": 0.1}, "DeltaNet") == 0.1
