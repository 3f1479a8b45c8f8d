"""What routers choose, and how balance without a loss moves their biases."""

import pytest
import torch
from torch import nn

from subquad.errors import UserError
from subquad.layers import MoE
from subquad.layers.routers import count_loads, update_balance_biases
from subquad.models.config import LMConfig
from subquad.models.lm import LM
from subquad.train.task import LanguageModeling


def swiglu(moe: MoE, expert: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (moe.experts.gate_up[expert] @ x).chunk(2)
    return moe.experts.down[expert] @ (nn.functional.silu(gate) * up)


@torch.no_grad()
def test_experts_choose_tokens_of_each_sequence():
    moe = MoE(6, n_experts=3, routing="expert_choice", capacity_factor=1.2, d_ff=8).double()
    lengths = [5, 0, 1, 8]
    cu_seqlens = torch.tensor([0, 5, 5, 6, 14], dtype=torch.int32)
    x = torch.randn(1, 16, 6, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        rows = x[0, start : start + length]
        scores = (rows @ moe.router.weight.T).softmax(-1)
        for e in range(3):
            for t in scores[:, e].topk(min(length, -(-length * 12 // 30))).indices.tolist():
                expected[0, start + t] += scores[t, e] * swiglu(moe, e, rows[t])
    torch.testing.assert_close(moe(x, None, cu_seqlens)[0], expected)


def test_expert_choice_says_that_it_cannot_decode():
    moe = MoE(8, routing="expert_choice")
    assert not moe.causal
    assert not hasattr(moe, "init_state")
    with pytest.raises(UserError, match="cannot go on from a state"):
        moe(torch.randn(1, 3, 8), ())


@torch.no_grad()
def test_only_the_best_groups_take_part():
    moe = MoE(8, n_experts=8, n_groups=4, top_groups=1, top_k=2)
    expert = moe.router.choose(moe.router.scores(moe.router(torch.randn(50, 8)))).expert
    assert (expert[:, 0] // 2 == expert[:, 1] // 2).all()


@torch.no_grad()
def test_the_bias_moves_the_choice_and_not_the_weights():
    moe = MoE(8, n_experts=4, top_k=1, renormalize=False, balance_rate=0.1)
    x = torch.randn(30, 8)
    scores = moe.router.scores(moe.router(x))
    moe.router.balance_bias[2] = 10.0
    choice = moe.router.choose(scores)
    assert (choice.expert == 2).all()
    torch.testing.assert_close(choice.weight[:, 0], scores[:, 2])


BALANCED = {"name": "MoE", "n_experts": 4, "top_k": 1, "balance_loss": 0.0, "balance_rate": 0.01, "d_ff": 8}


@pytest.mark.parametrize("recompute", [False, True])
def test_loads_are_counted_once(recompute):
    """Activation checkpointing runs forward twice; two batches before a step add up."""
    torch.manual_seed(0)
    model = LM(LMConfig(d_model=16, blocks=[{"repeat": 2, "pattern": [{"ffn": BALANCED}]}]))
    model.checkpoint_activations = recompute
    for _ in range(2):
        x, _, shared = model.hidden(torch.randint(256, (2, 20)))
        count_loads(model, shared)
        x.sum().backward()
    routers = [block.ffn.router for block in model.blocks]
    loads = [router.load.clone() for router in routers]
    assert [load.sum() for load in loads] == [80, 80]
    update_balance_biases(model)
    for router, load in zip(routers, loads, strict=True):
        torch.testing.assert_close(router.balance_bias, 0.01 * (load.mean() - load).sign())
        assert router.load is None
    before = routers[0].balance_bias.clone()
    update_balance_biases(model)  # nothing counted since
    assert torch.equal(routers[0].balance_bias, before)


@torch.no_grad()
def test_biases_even_out_the_load():
    moe = MoE(8, n_experts=4, top_k=1, score="sigmoid", balance_rate=0.01)
    moe.router.weight[0] += 1.0
    x = torch.randn(1, 400, 8) + 0.5

    def busiest() -> float:
        shared = {}
        moe(x, shared=shared)
        count_loads(moe, shared)
        update_balance_biases(moe)
        return float(shared["log/router_load_max.0"])

    first = busiest()
    last = [busiest() for _ in range(300)][-1]
    assert first > 1.8 and last < 1.2, (first, last)


def test_the_training_step_of_lightning_moves_biases(tmp_path):
    from lightning import Trainer

    from subquad.train.rows import Batch

    torch.manual_seed(0)
    task = LanguageModeling(LMConfig(d_model=16, blocks=[{"pattern": [{"ffn": BALANCED}]}]))
    tokens = torch.randint(256, (1, 33))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.tensor([0, 32], dtype=torch.int32), 1.0, None)
    loader = torch.utils.data.DataLoader([batch] * 4, batch_size=None)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=2,
        accumulate_grad_batches=2,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, loader)
    router = task.lm.blocks[0].ffn.router
    assert router.load is None
    assert 0.005 < router.balance_bias.abs().max() < 0.025  # two steps of 0.01, which may cancel


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n_groups": 3}, "n_groups 3 does not divide n_experts 8"),
        ({"n_groups": 4, "top_groups": 1, "top_k": 3}, "top_groups is 1"),
        ({"n_groups": 8, "top_groups": 2}, "sums two experts"),
        ({"routing": "expert_choice", "balance_rate": 0.1}, "expert_choice takes no"),
        ({"capacity_factor": 2.0}, "capacity_factor"),
        ({"shared_gate": True}, "shared_gate needs shared experts"),
    ],
)
def test_impossible_routers(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        MoE(16, **arguments)
