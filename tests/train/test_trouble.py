"""What goes wrong while a run trains: losses that are no numbers, a plot that fails, files that vanish."""

import csv
import math
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch

from subquad.cli import main as subquad
from subquad.errors import UserError
from subquad.train.data import TextData
from subquad.train.progress import draw_curve
from subquad.train.task import LanguageModeling


def fit(config, run, *more):
    return subquad(["train", "fit", "--config", str(config), "--run", str(run), "--checkpoint_every", "3", *more])


def resume(run, *more):
    return subquad(["train", "fit", "--run", str(run), "--resume", *more])


def weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


def break_loss(value):
    """The loss of step 8 is `value`."""
    whole = LanguageModeling.nats

    def nats(self, batch, stage):
        total, count, shared = whole(self, batch, stage)
        return (total + value if stage == "train" and self.global_step == 7 else total), count, shared

    return "nats", nats


def break_gradient(value):
    """A gradient of step 8 is `value` where the loss is fine."""

    def on_after_backward(self):
        if self.global_step == 7:
            next(self.parameters()).grad.view(-1)[0] = value

    return "on_after_backward", on_after_backward


def break_weight(value):
    """A weight is `value` after step 8."""
    whole = LanguageModeling.optimizer_step

    def optimizer_step(self, *args):
        whole(self, *args)
        if self.global_step == 7:  # it is counted after this
            next(self.parameters()).data.view(-1)[3] = value

    return "optimizer_step", optimizer_step


@pytest.mark.parametrize(
    ("fault", "value", "told"),
    [
        (break_loss, math.nan, "the loss is nan at step 8"),
        (break_loss, math.inf, "the loss is inf at step 8"),
        (break_gradient, math.nan, "the gradient's norm is nan at step 8"),
        (break_weight, math.nan, "weights are not finite at step 8"),
    ],
)
def test_what_is_not_finite_ends_training_and_is_never_saved(config, tmp_path, capsys, monkeypatch, fault, value, told):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModeling, *fault(value))
        every = ("--checkpoint_every", "1" if fault is break_weight else "3")
        assert fit(config, run, *every) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and told in errors[0] and "--resume" in errors[0]
    kept = sorted((run / "checkpoints").iterdir())
    assert kept and not (run / "model").exists()
    for path in kept:
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(t.isfinite().all() for t in state.values()), path.name
    if value is math.inf:
        assert resume(run) == 0
        assert fit(config, tmp_path / "unbroken") == 0
        assert weights(run) == weights(tmp_path / "unbroken")


def test_resuming_takes_the_learning_rate_it_is_given(config, tmp_path):
    run = tmp_path / "run"
    assert fit(config, run, "--trainer.max_steps", "6") == 0
    assert resume(run, "--trainer.max_steps", "12", "--model.lr", "0.001", "--model.weight_decay", "0.3") == 0
    with open(run / "metrics" / "metrics.csv", newline="", encoding="utf-8") as file:
        rates = {int(row["step"]): float(row["lr"]) for row in csv.DictReader(file) if row["lr"]}
    module = LanguageModeling.__new__(LanguageModeling)
    module.warmup_steps, module.min_lr_ratio = 3, 0.1
    for step, rate in rates.items():
        lr, steps = (0.01, 6) if step <= 6 else (0.001, 12)
        assert rate == pytest.approx(lr * module.lr_factor(step - 1, steps), rel=1e-6)
    (path,) = (run / "checkpoints").glob("*12.ckpt")
    groups = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_a_warm_up_longer_than_the_run_is_mentioned(config, tmp_path):
    with pytest.warns(UserWarning, match=r"12 steps end within model.warmup_steps 400: .* 0\.03 of model.lr"):
        assert fit(config, tmp_path / "run", "--model.warmup_steps", "400") == 0


def test_a_plot_that_fails_ends_no_run(config, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.warns(UserWarning, match="curve of .* was not drawn: "):
        assert fit(config, tmp_path / "run") == 0
    assert weights(tmp_path / "run") and not list((tmp_path / "run").glob("*curve*"))


@pytest.mark.parametrize("values", ["nan", "inf", "-inf", "1e308", "-1e308", "0", "1e-320"])
def test_a_curve_of_any_values_is_drawn(tmp_path, values):
    (tmp_path / "metrics").mkdir()
    rows = [f"{step},{values if step != 3 else 2.0},{values if step % 2 else ''}" for step in range(1, 6)]
    (tmp_path / "metrics" / "metrics.csv").write_text("\n".join(["step,train/bpb,val/bpb", *rows]), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not drawn.*")
        assert draw_curve(tmp_path, 1.5) == tmp_path / "curve.png"


@pytest.mark.parametrize("change", ["deleted", pytest.param("changed", marks=pytest.mark.slow)])
def test_a_run_outlives_its_text(config, tmp_path, monkeypatch, capsys, change):
    """The text vanishes in the middle of a run; its validation, its export and its figures are those of the text."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text("".join(f"line {i} {j}\n" for j in range(200)), encoding="utf-8")
    files = ("--data.files", str(texts / "*.txt"))
    assert fit(config, tmp_path / "whole", *files) == 0
    last = [line for line in capsys.readouterr().out.splitlines() if "bits per byte" in line]

    def spoil(self, optimizer):
        for path in texts.iterdir() if self.global_step == 7 else ():
            path.unlink() if change == "deleted" else path.write_text(f"{path}\n" * 99)

    monkeypatch.setattr(LanguageModeling, "on_before_optimizer_step", spoil)
    assert fit(config, tmp_path / "run", *files) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "bits per byte" in line] == last
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    for command in ("validate", "test"):
        named = [] if command == "validate" else ["--data.test_files", str(texts / "*.txt")]
        assert subquad(["train", command, "--run", str(tmp_path / "run"), *named]) == (2 if change == "deleted" else 0)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert all("no file matches" in line for line in errors) and len(errors) == (2 if change == "deleted" else 0)


def test_test_after_a_run(config, tmp_path, texts, capsys):
    assert fit(config, tmp_path / "run") == 0
    capsys.readouterr()
    assert subquad(["train", "test", "--run", str(tmp_path / "run"), "--data.test_files", str(texts / "0*.txt")]) == 0
    assert "test: " in capsys.readouterr().out
    other = tmp_path / "other.txt"
    other.write_text("never seen before\n" * 30, encoding="utf-8")
    assert subquad(["train", "validate", "--run", str(tmp_path / "run"), "--data.val_files", str(other)]) == 0


def test_resuming_with_other_rows_is_one_sentence(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert fit(config, run, "--trainer.max_steps", "4") == 0
    kept = sorted((path, path.stat().st_mtime_ns) for path in (run / "checkpoints").iterdir())
    capsys.readouterr()
    assert resume(run, "--trainer.max_steps", "20", "--data.context", "24") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the checkpoint was trained with context 48, here it is 24" in error
    assert sorted((path, path.stat().st_mtime_ns) for path in (run / "checkpoints").iterdir()) == kept


@pytest.fixture
def data(texts, tmp_path):
    """A function that gives the data of one process, set up, on copies of the texts."""
    shutil.copytree(texts, tmp_path / "copies")

    def make(**options):
        given = {"val_fraction": 0.2, "context": 48, "batch_tokens": 192, "cache": str(tmp_path / "cache"), **options}
        found = TextData(str(tmp_path / "copies" / "*.txt"), **given)
        found.setup("fit")
        return found

    return make


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seed", {"seed": 1}),
        ("context", {"context": 47}),
        ("batch_tokens", {"batch_tokens": 96}),
        ("truncate", {"truncate": 48}),
        ("tokens", {"val_fraction": 0.3}),
        ("text", {"changed": b"z"}),
        ("tokens", {"changed": b"zz"}),
        ("processes", {"world_size": 2}),
    ],
)
def test_whatever_the_order_of_the_text_follows_from_is_compared(data, tmp_path, texts, name, options):
    options = dict(options)
    if "changed" in options:  # what is validation would be chosen anew
        options["val_files"] = str(texts / "00.txt")
    same = {"val_files": options.get("val_files")}
    state = data(**same).state_dict()
    assert data(**same).load_state_dict(state) is None, "the same data goes on"
    old = {key: state[key] for key in ("position", "seed", "tokens")}
    assert data(**same).load_state_dict(old) is None, "so does a checkpoint of version 0.1.0"
    if letter := options.pop("changed", b""):
        for path in (tmp_path / "copies").glob("1*.txt"):
            path.write_bytes(path.read_bytes().replace(b"a", letter))
    world_size = options.pop("world_size", None)
    other = data(**options)
    if world_size is not None:
        other.trainer = SimpleNamespace(world_size=world_size, state=SimpleNamespace(fn="fit"))
    with pytest.raises(UserError, match=f"the data changed: the checkpoint was trained with {name} "):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches is 0; it must be at least 1"),
        (["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"], "the learning rate's cosine needs an end"),
    ],
)
def test_a_run_that_would_fail_or_never_end_leaves_nothing(config, tmp_path, capsys, options, told):
    assert fit(config, tmp_path / "run", *options) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_without_validation_and_logs(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert fit(config, run, "--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "0") == 0
    assert weights(run) and "no validation (gzip -9" in capsys.readouterr().out
    assert subquad(["train", "validate", "--run", str(run)]) == 2
    assert "trainer.limit_val_batches is 0, so nothing was read" in capsys.readouterr().err


def test_a_run_of_no_steps(config, tmp_path):
    assert fit(config, tmp_path / "run", "--trainer.max_steps", "0") == 0
    assert weights(tmp_path / "run")
