"""`subquad compare recall`: the tasks have one answer each, runs resume, figures and refusals."""

import csv
import json

import pytest
import torch

from subquad import cli
from subquad.compare import recall, recall_runs
from subquad.compare.recall_experiment import DEFAULTS
from subquad.compare.recall_tasks import MQAR, TASKS, Induction, Needle, Parity, make_task

TINY = ["compare", "recall", "--d-model", "16", "--blocks", "1", "--steps", "2", "--batch", "4", "--device", "cpu"]
SMALL_MQAR = "{name: mqar, length: 12, pairs: 2, vocabulary: 8}"


def recalled(tokens, task):
    """The value that followed a key the first time, at each later occurrence of it."""
    pairs = dict(zip(tokens[: 2 * task.pairs : 2], tokens[1 : 2 * task.pairs : 2], strict=True))
    assert len(set(pairs.values())) == len(pairs) == task.pairs
    return {t: pairs[token] for t, token in enumerate(tokens) if t >= 2 * task.pairs and token}


def followed(tokens, task):
    return {len(tokens) - 1: tokens[tokens.index(0) + 1]}


def copied(tokens, task):
    data = [token for token in tokens if token > 1]
    return {t: data.pop(0) for t, token in enumerate(tokens) if token == 1}


def counted(tokens, task):
    return {t: sum(tokens[: t + 1]) % task.modulus for t in range(len(tokens))}


def found(tokens, task):
    first = tokens.index(0)
    question = len(tokens) - task.digits
    assert tokens[question] == 0 and tokens.count(0) == 2
    return {question + i: tokens[first + 1 + i] for i in range(task.digits)}


ORACLES = {
    "mqar": recalled,
    "induction": followed,
    "selective_copying": copied,
    "parity": counted,
    "modular_counting": counted,
    "needle": found,
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [None, 100, "shortest"])
def test_tokens_alone_give_every_answer(name, length):
    task = make_task("here", name)
    tokens, targets = task.examples(3, 32, task.shortest if length == "shortest" else length)
    assert tokens.min() >= 0 and tokens.max() < task.vocab_size
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert {t: answer for t, answer in enumerate(wanted) if answer != -100} == ORACLES[name](row, task)


@pytest.mark.parametrize("name", TASKS)
def test_examples_follow_from_the_seed(name):
    task = make_task("here", name)
    first, again, other = (task.examples(seed, 16) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.tokens, other.tokens)
    torch.manual_seed(0)
    before = torch.rand(3)
    torch.manual_seed(0)
    task.examples(1, 4)
    assert torch.equal(torch.rand(3), before), "torch's own random numbers were used up"


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_what_a_guess_gets(name):
    """Of the sequence's values in MQAR, of all answers elsewhere."""
    task = make_task("here", name)
    tokens, targets = task.examples(5, 2000)
    asked = targets[targets != -100]
    if name == "mqar":
        values = tokens[:, 1 : 2 * task.pairs : 2]
        guess = values.gather(1, torch.randint(task.pairs, targets.shape))[targets != -100]
    else:
        answers = asked.unique()
        guess = answers[torch.randint(len(answers), asked.shape)]
    assert float((guess == asked).float().mean()) == pytest.approx(task.chance, rel=0.1)


def test_depth_of_the_needle():
    for depth, place in ((0.0, 0), (1.0, 64 - 9), (0.5, 28)):
        tokens, _ = Needle(depth=depth).examples(0, 4)
        assert tokens[0].tolist().index(0) == place


def test_distance_of_the_needle():
    task = Needle(digits=2, distance=7)
    tokens, targets = task.examples(0, 8)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        place = row.index(0)
        assert [t for t, answer in enumerate(wanted) if answer != -100] == [place + 1 + 7, place + 2 + 7]
    assert task.shortest == 10


def test_past_the_training_length_only_what_lies_there_counts(monkeypatch):
    """A model that counts right up to token 8 and is wrong after it."""

    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens):
            answers = tokens.cumsum(1) % 2
            answers[:, 8:] = 1 - answers[:, 8:]
            return torch.nn.functional.one_hot(answers, 2).float(), None

    monkeypatch.setattr(recall_runs, "AT_ONCE", 64)
    assert recall_runs.accuracy(Counter(), Parity(length=8), 8) == 1.0
    assert recall_runs.accuracy(Counter(), Parity(length=8), 16) == 0.0


def test_tables_files_and_resuming(tmp_path, capsys, monkeypatch):
    out, table = tmp_path / "runs" / "recall", tmp_path / "recall.csv"
    given = [*TINY, "--tasks", SMALL_MQAR, "parity", "--layers", "LinearAttention", "{name: Attention, window: 4}"]
    given += ["--seeds", "2", "--beyond", "2", "--out", str(out)]
    assert cli.main([*given, "--csv", str(table)]) == 0
    shown = capsys.readouterr().out
    assert "Attention, window 4" in shown and "chance 50" in shown
    assert max(map(len, shown.splitlines())) <= 80
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 8
    assert all(0 <= float(row[key]) <= 1 for row in rows for key in ("accuracy at 1x", "accuracy at 2x"))
    lines = (out / "results.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert (out / "recall.png").read_bytes().startswith(b"\x89PNG")

    done = []
    perform = recall_runs.perform
    monkeypatch.setattr(recall_runs, "perform", lambda run, *rest: done.append(run["seed"]) or perform(run, *rest))
    assert cli.main(given) == 0
    assert done == []
    assert capsys.readouterr().out == shown
    kept = [line for line in lines if json.loads(line)["seed"] == 0]
    (out / "results.jsonl").write_text("\n".join([*kept, lines[-1][:40]]))  # killed while it wrote
    assert cli.main([*given, "--csv", str(tmp_path / "again.csv")]) == 0
    assert done == [1] * 4
    assert "line 5 is no whole run" in capsys.readouterr().err
    assert list(csv.DictReader((tmp_path / "again.csv").open())) == rows, "a run does not follow from its seed"
    done.clear()
    assert cli.main([*given, "--lr", "0.01"]) == 0
    assert len(done) == 8, "runs of other settings were taken for these"


def test_the_widest_table_fits_80_columns(capsys):
    wide = {"state_bytes": 8_388_608, "parameters": 1_234_567, "lengths": [64, 128, 256]}
    rows = [{"layer": "Attention, n_kv_heads 1, window 16", "accuracy": [(0.994, 0.98, 1.0)] * 3, **wide}]
    recall.Console(width=80).print(recall._table(MQAR(), rows, DEFAULTS))
    shown = capsys.readouterr().out
    assert shown.count("99 98-100") == 3 and "8,388,608" in shown and "1,235 k" in shown
    assert recall._percent((0.5, 0.498, 0.502)) == "50"
    assert recall._percent(None) == "-"


def test_interrupted_runs_are_not_recorded(tmp_path, monkeypatch):
    def interrupt(*rest):
        raise KeyboardInterrupt

    given = [*TINY, "--tasks", "parity", "--layers", "LinearAttention", "--seeds", "2", "--out", str(tmp_path)]
    stream = recall_runs._Stream.__iter__
    monkeypatch.setattr(recall_runs._Stream, "__iter__", lambda self: interrupt() if self.run["seed"] else stream(self))
    assert cli.main(given) == 130
    assert [json.loads(line)["seed"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [0]


def test_layers_without_state_or_beyond_their_length(tmp_path, capsys):
    table = tmp_path / "t.csv"
    layers = ["--layers", "{name: LinearAttention, causal: false}", "{name: Hyena, max_len: 12}"]
    given = ["--tasks", SMALL_MQAR, "--seeds", "1", "--beyond", "2", "--out", str(tmp_path), "--csv", str(table)]
    assert cli.main([*TINY, *layers, *given]) == 0
    first, second = csv.DictReader(table.open())
    assert first["state_bytes"] == "" and first["accuracy at 2x"] != ""
    assert int(second["state_bytes"]) > 0 and second["accuracy at 2x"] == ""


def test_training_learns(tmp_path):
    """One answer token among two: a few steps suffice."""
    layers = ["--layers", "{name: Attention, window: 4}", "--seeds", "1", "--beyond", "--out", str(tmp_path)]
    tasks = ["--tasks", "{name: induction, length: 3, vocabulary: 2}", "--steps", "60", "--batch", "16", "--lr", "0.01"]
    assert cli.main([*TINY, *layers, *tasks]) == 0
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["found"]["accuracy"] == [1.0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "mqr"], "there is no task 'mqr'; did you mean 'mqar'?"),
        (["--tasks", "{name: mqar, pair: 4}"], "unknown key 'pair'; did you mean 'pairs'?"),
        (["--tasks", "{name: mqar, pairs: a}"], "--tasks.pairs is 'a' (str); it must be int"),
        (["--tasks", "{name: mqar, pairs: 0}"], "mqar: pairs is 0; it must be at least 1"),
        (["--tasks", "{name: mqar, length: 8}"], "mqar: length is 8; with these knobs it must be at least 24"),
        (["--tasks", "{name: needle, depth: 2.0}"], "needle: depth is 2.0; it must be between 0 and 1"),
        (["--layers", "Atention"], "there is no layer 'Atention'; did you mean 'Attention'?"),
        (["--preset", "laptpo"], "--preset: there is no 'laptpo'; did you mean 'laptop'?"),
        (["--beyond", "1"], "--beyond has 1; a multiple past the training length is at least 2"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--lr", "nan"], "--lr is nan; it must be above 0"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, said):
    assert cli.main([*TINY, "--out", str(tmp_path / "runs"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_vocabulary_that_cannot_hold_the_pairs():
    with pytest.raises(ValueError, match="mqar: vocabulary is 8; 5 pairs need at least 10"):
        MQAR(pairs=5, vocabulary=8)
    with pytest.raises(ValueError, match="induction: length 2 is too short; it must be at least 3"):
        Induction().examples(0, 1, 2)
