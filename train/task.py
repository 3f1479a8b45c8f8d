"""The LightningModule: next-token prediction on packed rows."""

from collections.abc import Mapping
from math import cos, log, pi
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from subquad.errors import UserError
from subquad.kernels.state import accumulator_dtype
from subquad.layers.base import parameters_with
from subquad.layers.routers import count_loads, update_balance_biases
from subquad.models.config import LMConfig
from subquad.models.lm import LM, LMState
from subquad.train.rows import IGNORED, Batch, Carry


class LanguageModeling(LightningModule):
    """Trains an LM on the targets of a `subquad.train.rows.Batch`: the next tokens of packed rows, or a task's answers.

    Losses that layers share under names that begin with "loss/" are added as they are; scalars under "log/" are logged.

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
        self._sums = torch.zeros(2)

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
        loss = total / count.clamp(min=1)
        self.log("step", float(self.global_step + 1))  # the loggers' axis: updates done once this batch is
        self.log("train/loss", loss.detach(), batch_size=1)
        self.log("train/bpb", loss.detach() / (log(2) * batch.bytes_per_token), batch_size=1)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)
        for name, value in shared.items():
            kind, _, rest = name.partition("/")
            if kind == "loss":
                loss = loss + value
            if kind in ("loss", "log"):
                self.log(f"train/{rest}", value.detach().float(), batch_size=1)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        update_balance_biases(self.lm)

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)
        self.carried.pop("val", None)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        total, count, _ = self.nats(batch, "val")
        self._sums += torch.stack([total.double(), count.double()]).cpu()
        self._bytes_per_token = batch.bytes_per_token

    def on_validation_epoch_end(self) -> None:
        total, count = self.trainer.strategy.reduce(self._sums.to(self.device, torch.float32), reduce_op="sum").tolist()
        self.carried.pop("val", None)
        self.log("step", float(self.global_step))
        self.log("val/loss", total / count, batch_size=1, sync_dist=False)
        self.log("val/bpb", total / count / (log(2) * self._bytes_per_token), batch_size=1, sync_dist=False)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> dict[str, Any]:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("the learning rate's cosine needs an end: give --trainer.max_steps or --trainer.max_epochs")
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "train" in self.carried:
            checkpoint["carried"] = tree_leaves(self.carried["train"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved_leaves = checkpoint.get("carried")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: decayed and not (norms, biases, embeddings, tied heads, what layers declare)."""
    spared = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    names = parameters_with(model, "no_decay")
    spared |= {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    decayed, kept = [], []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        (kept if id(parameter) in spared or parameter.dim() < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
