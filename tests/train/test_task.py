"""The loss, the optimiser's groups and truncated backpropagation."""

import itertools

import pytest
import torch
from lightning import Trainer
from torch import nn

from subquad.errors import UserError
from subquad.layers.base import parameters_with
from subquad.models.config import LMConfig
from subquad.train.data import TextData
from subquad.train.rows import IGNORED, Batch
from subquad.train.task import ROW_TARGETS, LanguageModeling, parameter_groups

HYBRID = [
    {"mixer": {"name": "GatedDeltaNet", "n_heads": 2}, "ffn": {"name": "SwiGLU"}},
    {"mixer": {"name": "Attention", "n_heads": 2, "window": 16}, "ffn": {"name": "MoE", "n_experts": 2, "top_k": 1}},
    {"mixer": {"name": "Mamba2", "d_state": 8}},
]


def task(blocks=HYBRID, **kwargs):
    torch.manual_seed(0)
    return LanguageModeling(LMConfig(d_model=16, vocab_size=256, blocks=[{"pattern": blocks}]), **kwargs)


def losses(module, tokens, cu_seqlens):
    """The loss of each token of a packed row, predicting the next one."""
    x, _, _ = module.lm.hidden(tokens, None, cu_seqlens)
    return nn.functional.cross_entropy(module.lm.head(x)[0, :-1], tokens[0, 1:], reduction="none")


def test_a_document_does_not_see_another():
    module = task().double()
    tokens = torch.randint(256, (1, 90))
    cu_seqlens = torch.tensor([0, 40, 70, 90], dtype=torch.int32)
    changed = tokens.clone()
    changed[0, :40] = torch.randint(256, (40,))
    before, after = losses(module, tokens, cu_seqlens), losses(module, changed, cu_seqlens)
    assert not torch.allclose(before[:39], after[:39])
    # The experts' products regroup when the routing of other tokens changes, so not to the last bit.
    torch.testing.assert_close(before[40:69], after[40:69], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(before[70:89], after[70:89], rtol=1e-12, atol=1e-12)


def test_ignored_targets_and_padding_add_nothing():
    module = task().double()
    tokens = torch.randint(256, (1, 64))
    targets = torch.randint(256, (1, 64))
    cu_seqlens = torch.tensor([0, 30, 50], dtype=torch.int32)
    targets[0, [29, 49]] = IGNORED
    targets[0, 50:] = IGNORED
    total, count, _ = module.nats(Batch(tokens, targets, cu_seqlens, 1.0, None), "train")
    expected = 0.0
    for a, b in ((0, 30), (30, 50)):
        logits, _ = module.lm(tokens[:, a:b])
        expected += nn.functional.cross_entropy(logits[0, :-1], targets[0, a : b - 1], reduction="sum")
    assert count == 48
    torch.testing.assert_close(total, expected)


def test_layers_losses_are_added_and_logged(config):
    logged = {}
    module = task()
    module.log = lambda name, value, **kwargs: logged.__setitem__(name, value)
    module._trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    tokens = torch.randint(256, (1, 33))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.tensor([0, 32], dtype=torch.int32), 1.0, None)
    loss = module.training_step(batch, 0)
    nats, count = module._update.tolist()
    extra = [name for name in logged if name.startswith("train/balance")]
    assert len(extra) == 1 and logged[extra[0]] > 0 and count == 32
    assert loss.item() == pytest.approx((nats / count + logged[extra[0]].item()) * count / ROW_TARGETS)


def test_weight_decay_spares_what_it_should():
    module = task()
    decayed, kept = (group["params"] for group in parameter_groups(module.lm, 0.1))
    names = {id(p): name for name, p in module.lm.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group} for group in (decayed, kept))
    assert decayed | kept == set(names.values()) and not decayed & kept
    for name in kept:
        parameter = module.lm.get_parameter(name)
        assert parameter.dim() < 2 or "embedding" in name or name in parameters_with(module.lm, "no_decay")
    assert {"embedding.weight", "norm.weight", "blocks.0.mixer_norm.weight"} <= kept
    assert any("A_log" in name for name in kept) and any("dt_bias" in name for name in kept)
    assert {"blocks.0.ffn.down_proj.weight", "blocks.1.mixer.q_proj.weight"} <= decayed


def test_learning_rate_rises_then_falls_as_a_cosine():
    module = task(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    factors = [module.lr_factor(step, 110) for step in range(111)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize("argument", [{"lr": 0.0}, {"warmup_steps": -1}, {"min_lr_ratio": 2.0}, {"betas": (0.9, 1.0)}])
def test_impossible_hyperparameters(argument):
    with pytest.raises(UserError, match=f"model.{next(iter(argument))}"):
        task(**argument)


def carrying(texts, tmp_path, blocks, **data):
    module = task(blocks).double()
    module._trainer = trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    source = TextData(str(texts / "*.txt"), val_fraction=0.2, context=96, cache=str(tmp_path), **data)
    source.trainer, trainer.datamodule = trainer, source
    source.setup("fit")
    return module, source


@pytest.mark.parametrize("block", HYBRID, ids=lambda block: block["mixer"]["name"])
def test_carried_state_is_the_long_sequence(texts, tmp_path, block):
    """Reading 24 tokens a step with the state carried gives the losses of reading each piece at once."""
    module, source = carrying(texts, tmp_path, [block], batch_tokens=72, truncate=24)
    rows = source.rows("train", shuffle=True)
    found = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for position in range(rows.per_epoch):
            total, count, _ = module.nats(rows[position], "train")
            found += torch.stack([total, count.double()])
    # The same line of pieces cut at the same three places, each part read as whole pieces.
    expected = torch.zeros(2, dtype=torch.float64)
    tokens = torch.from_numpy(rows.data.tokens[:].astype("int64"))
    with torch.no_grad():
        for stream in range(3):
            order, begins = rows._line(0)
            low, high = stream * rows.part, min((stream + 1) * rows.part, rows.total)
            for j, piece in enumerate(order.tolist()):
                a, b = max(low, int(begins[j])), min(high, int(begins[j + 1]))
                if a < b:
                    start = int(rows.starts[piece]) + a - int(begins[j])
                    stop = start + b - a
                    known = min(stop, int(rows.document_end[piece]) - 1) - start
                    logits, _ = module.lm(tokens[None, start:stop])
                    targets = tokens[start + 1 : start + 1 + known]
                    loss = nn.functional.cross_entropy(logits[0, :known], targets, reduction="sum")
                    expected += torch.stack([loss, torch.tensor(float(known), dtype=torch.float64)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_gradients_stop_between_steps(texts, tmp_path):
    module, source = carrying(texts, tmp_path, HYBRID, batch_tokens=72, truncate=24)
    rows = source.rows("train", shuffle=True)
    for position in range(2):
        module.zero_grad()
        total, _, _ = module.nats(rows[position], "train")
        total.backward()  # a second backward through the first step's graph would raise
    assert any(rows[1].carry.continues.tolist())
    assert all(not leaf.requires_grad for leaf in torch.utils._pytree.tree_leaves(module.carried["train"]))
