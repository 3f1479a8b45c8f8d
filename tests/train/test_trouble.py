"""What goes wrong while a run trains: losses that are no numbers, a plot that fails, files that vanish."""

import csv
import math

import pytest
import torch

from subquad.cli import main as subquad
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
