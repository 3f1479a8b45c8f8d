"""What an update follows: the mean over all targets of its rows, on one process and on several."""

import math
import os
import subprocess
import sys

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from subquad.errors import UserError  # noqa: F401 (of the script below)
from subquad.models.config import LMConfig
from subquad.train.rows import IGNORED, Batch
from subquad.train.task import LanguageModeling

MIXER = {"mixer": {"name": "LinearAttention", "n_heads": 2}, "ffn": {"name": "SwiGLU"}}
EXPERTS = {"mixer": {"name": "GatedShortConv"}, "ffn": {"name": "MoE", "n_experts": 3, "top_k": 1}}
TARGETS = [40, 3, 40, 1, 0, 17, 40, 40, 2]  # of each row; what is left of its 40 tokens is padding


def rows(targets=TARGETS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    found = []
    for count in targets:
        tokens, wanted = torch.randint(32, (2, 1, 40), generator=draw)
        wanted[:, count:] = IGNORED
        found.append(Batch(tokens, wanted, torch.tensor([0, count], dtype=torch.int32), 1.0, None))
    return found


def task(block, **kwargs):
    torch.manual_seed(0)
    lm = LMConfig(d_model=16, vocab_size=32, blocks=[{"pattern": [block]}])
    return LanguageModeling(lm, warmup_steps=0, **kwargs).double()


class Gradients(Callback):
    """Each update's gradient and loss, before clipping."""

    def __init__(self):
        self.seen, self.losses = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        self.losses.append(float(trainer._results["optimizer_step.train/loss"].value))


def trained(module, batches, **kwargs):
    gradients = Gradients()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision="64-true",
        callbacks=[gradients],
        **{"max_epochs": 2, "gradient_clip_val": 1e-9, **kwargs},
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return gradients


def wanted(module, batches):
    """The gradient and the value of the mean over all targets of the batches, read one after the other."""
    totals, extras, counts = [], [], []
    for batch in batches:
        total, count, shared = module.nats(batch, "train")
        totals.append(total)
        counts.append(count)
        extras.append(sum(value for name, value in shared.items() if name.startswith("loss/")))
    mean = sum(totals) / max(sum(counts), 1)
    extra = sum(e * c for e, c in zip(extras, counts, strict=True)) / max(sum(counts), 1)
    found = torch.autograd.grad(mean + extra, list(module.parameters()))
    return torch.cat([g.flatten() for g in found]), mean.item()


@pytest.mark.parametrize("block", [MIXER, EXPERTS], ids=["LinearAttention", "MoE"])
@pytest.mark.parametrize("accumulate", [1, 2, 4, 20])
def test_an_update_follows_the_mean_over_its_targets(block, accumulate):
    """Rows with 0 to 40 targets, of which the last ones of an epoch do not fill an update."""
    module, batches = task(block), rows()
    found = trained(module, batches, accumulate_grad_batches=accumulate, max_epochs=1)
    assert len(found.seen) == math.ceil(len(batches) / accumulate)
    # Gradients clipped to nothing leave the weights where they were but for a step of AdamW each: so only the first.
    gradient, loss = wanted(task(block), batches[:accumulate])
    torch.testing.assert_close(found.seen[0], gradient, rtol=1e-11, atol=1e-14)
    assert found.losses[0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_every_update_of_two_epochs(accumulate):
    """With a learning rate of next to nothing, all of them."""
    batches = rows()
    found = trained(task(MIXER, lr=1e-300, weight_decay=0.0), batches, accumulate_grad_batches=accumulate)
    groups = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)] * 2
    assert len(found.seen) == len(groups)
    for gradient, loss, group in zip(found.seen, found.losses, groups, strict=True):
        expected, mean = wanted(task(MIXER), group)
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-14)
        assert loss == pytest.approx(mean, rel=1e-6)


TWO_PROCESSES = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_update as t

if __name__ == "__main__":
    import os
    rank = int(os.environ["LOCAL_RANK"])
    batches = t.rows()[rank * 4 : rank * 4 + 4]
    module = t.task(t.MIXER, lr=1e-300, weight_decay=0.0)
    if sys.argv[3] == "nan" and rank == 1:
        batches[2] = batches[2]._replace(tokens=batches[2].tokens * 0)
        nats = module.nats
        def broken(batch, stage):
            total, count, shared = nats(batch, stage)
            return total * (float("nan") if not batch.tokens.any() else 1.0), count, shared
        module.nats = broken
    try:
        found = t.trained(
            module, batches, accumulate_grad_batches=2, max_epochs=1, strategy="ddp", devices=2,
            use_distributed_sampler=False,
        )
    except t.UserError as error:
        print(f"rank {rank}: {error}", flush=True)
    else:
        torch.save((found.seen, found.losses), f"{sys.argv[2]}/{rank}.pt")
"""


def two_processes(tmp_path, mode):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    return subprocess.run(
        [*command, script, os.path.dirname(__file__), tmp_path, mode],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_processes_with_unequal_rows(tmp_path):
    assert two_processes(tmp_path, "fine").returncode == 0
    (seen, losses), (other, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    batches = rows()
    for i, (gradient, loss) in enumerate(zip(seen, losses, strict=True)):
        expected, mean = wanted(task(MIXER), [batches[r * 4 + i * 2 + j] for r in range(2) for j in range(2)])
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-14)
        assert torch.equal(gradient, other[i]) and loss == pytest.approx(mean, rel=1e-6)
    assert len(seen) == 2


@pytest.mark.slow
def test_all_processes_end_where_one_has_nan(tmp_path):
    done = two_processes(tmp_path, "nan")
    assert done.returncode == 0
    for rank in range(2):
        assert f"rank {rank}: the loss is nan at step 2" in done.stdout
