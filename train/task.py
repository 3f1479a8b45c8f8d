"""The LightningModule: next-token prediction on packed rows."""

from collections.abc import Callable, Mapping
from functools import reduce
from math import cos, isfinite, log, nan, pi
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from subquad.errors import UserError
from subquad.kernels.state import accumulator_dtype
from subquad.layers.base import parameters_with
from subquad.layers.build import check_type
from subquad.layers.routers import count_loads, update_balance_biases
from subquad.models.config import LMConfig
from subquad.models.lm import LM, LMState
from subquad.train.checkpoints import over_ranks
from subquad.train.rows import IGNORED, Batch, Carry

# What a row's summed loss is divided by at first: the same for all rows, a power of two, near the number of targets.
ROW_TARGETS = 4096


class LanguageModeling(LightningModule):
    """Trains an LM on the targets of a `subquad.train.rows.Batch`: the next tokens of packed rows, or a task's answers.

    An update follows the mean over all targets of its rows, those accumulated and those of every process. Losses that
    layers share under names that begin with "loss/" are added to their row's mean and count by its targets with it;
    scalars under "log/" are logged. A loss or gradient that is not finite ends training before the update.

    Args:
        lm: the model.
        lr: highest learning rate, of AdamW.
        warmup_steps: steps over which it rises from 0; then it falls as a cosine to min_lr_ratio * lr at the last step.
        min_lr_ratio: see warmup_steps.
        weight_decay: of matrices and filters. Norms, biases, embeddings (and with them a tied head) and what a layer
            declares (decay rates, step sizes, gates) are not decayed.
        betas: of AdamW.
        checkpoint_activations: recompute each block in the backward pass instead of keeping what it computed.
    """

    def __init__(
        self,
        lm: LMConfig,
        lr: float = 2e-3,
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.1,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        if isinstance(lm, Mapping):  # as a checkpoint's hyperparameters hold it
            lm = LMConfig.from_dict(lm)
        hints = get_type_hints(LanguageModeling.__init__)
        given = {"lr": lr, "warmup_steps": warmup_steps, "min_lr_ratio": min_lr_ratio, "weight_decay": weight_decay}
        for name, value in (given | {"betas": tuple(betas or ())}).items():
            check_type(f"model.{name}", value, hints[name])
        for name, value, fine in (
            ("lr", lr, lr > 0),
            ("warmup_steps", warmup_steps, warmup_steps >= 0),
            ("min_lr_ratio", min_lr_ratio, 0 <= min_lr_ratio <= 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("betas", betas, all(0 <= b < 1 for b in betas)),
        ):
            if not fine:
                raise UserError(f"model.{name} is {value}, which is out of range")
        self.lr, self.warmup_steps, self.min_lr_ratio = lr, warmup_steps, min_lr_ratio
        self.weight_decay, self.betas = weight_decay, betas
        self.save_hyperparameters(
            {
                "lm": lm.to_dict(),
                "lr": lr,
                "warmup_steps": warmup_steps,
                "min_lr_ratio": min_lr_ratio,
                "weight_decay": weight_decay,
                "betas": list(betas),
                "checkpoint_activations": checkpoint_activations,
            },
            logger=False,
        )
        self.lm = LM(lm)
        self.lm.checkpoint_activations = checkpoint_activations
        self.carried: dict[str, LMState] = {}  # stage -> the streams' state, under truncated backpropagation
        self._saved_leaves: list[Tensor] | None = None
        self._sums = torch.zeros(2)  # (nats, targets) of the validation so far
        self._update: Tensor | None = None  # the same of the rows since the last update

    def nats(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(summed cross entropy, number of targets, what the layers shared) of a batch."""
        state = None if batch.carry is None else self._begin(batch.carry, stage)
        x, state, shared = self.lm.hidden(batch.tokens, state, batch.cu_seqlens)
        if batch.carry is not None:
            self.carried[stage] = tree_map(lambda t: t.detach().index_select(0, batch.carry.last), state)
        logits = self.lm.logits(x).flatten(0, 1)
        logits = logits.to(accumulator_dtype(logits.dtype))
        total = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total, (batch.targets != IGNORED).sum(), shared

    def _begin(self, carry: Carry, stage: str) -> LMState:
        """The state of each sequence of a row: its stream's where it goes on, else that before any token."""
        fresh = self.lm.init_state(len(carry.stream), self.trainer.datamodule.context)
        if stage == "train" and self._saved_leaves is not None:
            leaves = [t.to(self.device) for t in self._saved_leaves]
            self.carried[stage] = tree_unflatten(leaves, tree_structure(fresh))
            self._saved_leaves = None
        if stage not in self.carried:
            return fresh

        def choose(new: Tensor, old: Tensor) -> Tensor:
            goes_on = carry.continues.view(-1, *[1] * (new.dim() - 1))
            return torch.where(goes_on, old.index_select(0, carry.stream), new)

        return tree_map(choose, fresh, self.carried[stage])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        total, count, shared = self.nats(batch, "train")
        count_loads(self.lm, shared)
        sums = self._exactly(total.detach(), count)
        self._update = sums if self._update is None else self._update + sums
        self._bytes_per_token = batch.bytes_per_token
        loss = total / count.clamp(min=1)
        for name, value in shared.items():
            kind, _, rest = name.partition("/")
            if kind == "loss":
                loss = loss + value
            if kind in ("loss", "log"):
                self.log(f"train/{rest}", value.detach().float(), batch_size=1)
        return loss * (count / ROW_TARGETS)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_closure: Callable[[], Any]
    ) -> None:
        def closure() -> Any:
            found = optimizer_closure()
            self._average(optimizer)  # before hooks and clipping see the gradient
            return found

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        update_balance_biases(self.lm)

    def _average(self, optimizer: Optimizer) -> None:
        """Make the sum of the rows' gradients that of the mean over their targets; end training if it is not finite."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # One look at the device an update. A norm that is not finite on one process is not finite in the sum.
        nats, targets, norm = self._over_ranks(torch.stack([*self._update, _norm(gradients).to(self._update)]))
        self._update = None
        step, loss, targets = self.global_step + 1, nats / max(targets, 1), max(targets, 1)
        if not isfinite(loss):
            raise self._not_finite(f"the loss is {loss} at step {step}")
        # Scaled for float16 a gradient may overflow: then the scaler leaves the update out and scales less.
        if not isfinite(norm) and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            raise self._not_finite(f"the gradient's norm is {norm} at step {step}")
        # What Lightning has divided by: accumulated rows and processes, though they hold unequal numbers of targets.
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        torch._foreach_mul_(gradients, ROW_TARGETS * parts / targets)
        self.log("step", float(step))  # the loggers' axis: updates done once this one is
        self.log("train/loss", loss, batch_size=1)
        self.log("train/bpb", loss / (log(2) * self._bytes_per_token), batch_size=1)
        self.log("lr", optimizer.param_groups[0]["lr"], batch_size=1)

    def _not_finite(self, what: str) -> UserError:
        return UserError(
            f"{what}, so training ended before that update was made or saved; go on from the newest checkpoint with "
            "--resume and a lower --model.lr or --trainer.gradient_clip_val"
        )

    def _exactly(self, *values: Tensor) -> Tensor:
        """Values to sum: float32 counts to 2**24, but Apple's GPUs have no float64."""
        return torch.stack([v.to(torch.float32 if v.device.type == "mps" else torch.float64) for v in values])

    def _over_ranks(self, sums: Tensor) -> list[float]:
        """Sums of the values over all processes."""
        return self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum").tolist()

    def on_validation_epoch_start(self) -> None:
        self._sums = self._exactly(*torch.zeros(2, device=self.device))
        self.carried.pop("val", None)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        total, count, _ = self.nats(batch, "val")
        self._sums = self._sums + self._exactly(total, count)
        self._bytes_per_token = batch.bytes_per_token

    def on_validation_epoch_end(self) -> None:
        total, count = self._over_ranks(self._sums)
        self.carried.pop("val", None)
        loss = total / count if count else nan
        self.log("step", float(self.global_step))
        self.log("val/loss", loss, batch_size=1, sync_dist=False)
        self.log("val/bpb", loss / (log(2) * self._bytes_per_token), batch_size=1, sync_dist=False)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def check_trainer(self, trainer: Trainer) -> None:
        """One sentence where a run would fail or never end."""
        if trainer.accumulate_grad_batches < 1:
            raise UserError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; it must be at least 1"
            )
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            raise UserError("the learning rate's cosine needs an end: give --trainer.max_steps or --trainer.max_epochs")

    def configure_optimizers(self) -> dict[str, Any]:
        self.check_trainer(self.trainer)
        steps = self.trainer.estimated_stepping_batches
        if 0 < steps <= self.warmup_steps:
            rank_zero_warn(
                f"the run's {steps} steps end within model.warmup_steps {self.warmup_steps}: the learning rate only "
                f"rises, to {self.lr_factor(steps - 1, steps):.3g} of model.lr"
            )
        groups = parameter_groups(self.lm, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, foreach=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_factor(step, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, step: int, steps: int) -> float:
        """Learning rate of the update after `step` ones, as a part of lr."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + cos(pi * done))

    def on_train_start(self) -> None:
        """Let the configuration decide on the learning rate where a checkpoint brought its own."""
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        schedule = config.scheduler
        schedule.base_lrs = [self.lr] * len(schedule.base_lrs)
        for group, decay in zip(optimizer.param_groups, (self.weight_decay, 0.0), strict=True):
            lr = self.lr * schedule.lr_lambdas[0](schedule.last_epoch)
            group.update(lr=lr, initial_lr=self.lr, weight_decay=decay, betas=self.betas)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"the checkpoint does not fit the configuration: {error}") from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not _norm([p.detach() for p in self.lm.parameters()]).isfinite():
            raise self._not_finite(f"weights are not finite at step {self.global_step}")
        carried = [t.cpu() for t in tree_leaves(self.carried["train"])] if "train" in self.carried else None
        of_ranks = over_ranks(carried)  # every process has streams of its own
        if carried is not None:
            checkpoint["carried_of_ranks"] = of_ranks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        of_ranks = checkpoint.get("carried_of_ranks")
        if of_ranks is None:  # as version 0.1.0 wrote it
            of_ranks = [checkpoint.get("carried")]
        self._saved_leaves = of_ranks[self.global_rank] if self.global_rank < len(of_ranks) else None


def _norm(tensors: list[Tensor]) -> Tensor:
    """The length of all of them as one vector, in float32 or wider; not finite where a value is not."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype)).norm()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: decayed and not (norms, biases, embeddings, tied heads, what layers declare)."""
    spared = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    names = parameters_with(model, "no_decay")
    spared |= {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    decayed, kept = [], []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        (kept if id(parameter) in spared or parameter.dim() < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
