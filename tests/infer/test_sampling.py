"""Tokens from scores of any kind: within the vocabulary, and where no score is a number, none."""

import itertools
import math
import random
import warnings

import pytest
import torch

from subquad.infer.generate import Context, decode, generate
from subquad.infer.sampling import NO_TOKEN, Sampling
from subquad.models.config import LMConfig
from subquad.models.lm import LM

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SETTINGS = (
    {},
    {"temperature": 1.0},
    {"temperature": 1e-40},
    {"temperature": 5e-324},
    {"temperature": 999.0, "top_k": 3},
    {"temperature": 1e-3, "top_p": 1e-300},
    {"temperature": 2.0, "top_p": 1.0, "min_p": 1.0},
    {"temperature": 0.7, "top_k": 10**9, "min_p": 0.0, "repetition_penalty": 999.0},
    {"temperature": 1e-30, "repetition_penalty": 1e-3},
    {"repetition_penalty": 1e-3},
)
N_TOKENS = 12


def pick(scores, settings, seen=None, seed=0):
    seen = torch.zeros(scores.shape, dtype=torch.bool) if seen is None else seen
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(scores))]
    return Sampling(**settings).pick(scores, seen, generators).tolist()


def extreme_scores(draw, dtype):
    """A row of scores of any size, some of them infinite or NaN."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.max, info.min, info.tiny, math.inf, -math.inf, math.nan]
    kind = draw.randrange(4)
    row = []
    for _ in range(N_TOKENS):
        value = draw.gauss(0, 1) * 10.0 ** draw.uniform(-8, math.log10(info.max) - 1)
        row.append(draw.choice(special) if draw.random() < (0, 0.2, 0.8, 1)[kind] else value)
    return torch.tensor(row, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pick_is_a_token_that_may_be_drawn(dtype):
    draw = random.Random(str(dtype))
    for settings in SETTINGS:
        rows = torch.stack([extreme_scores(draw, dtype) for _ in range(60)])
        seen = torch.tensor([[draw.random() < 0.4 for _ in range(N_TOKENS)] for _ in rows])
        for row, token in zip(
            rows.double().tolist(), pick(rows, settings, seen, seed=draw.randrange(2**31)), strict=True
        ):
            usable = [i for i, score in enumerate(row) if score > -math.inf]  # which NaN is not
            assert token in usable if usable else token == NO_TOKEN, (settings, row, token)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_is_the_best_and_nan_the_worst(dtype):
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[nan, 0.0, inf, nan], [nan, 0.0, -inf, nan], [nan] * 4, [-inf] * 4], dtype=dtype)
    for settings in ({}, {"temperature": 1.0}, {"temperature": 1e-40, "top_p": 0.9}, {"repetition_penalty": 2.0}):
        assert pick(rows, settings) == [2, 1, NO_TOKEN, NO_TOKEN]


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-37, 1e-38, 1e-40, 1e-45, 1e-46, 1e-300, 5e-324])
def test_cold_converges_to_greedy(temperature):
    torch.manual_seed(0)
    for dtype, scale in itertools.product(DTYPES, (1e-2, 1.0, 1e4)):
        scores = (torch.randn(50, N_TOKENS, dtype=torch.float64) * scale).to(dtype)
        best = scores.max(-1).values
        for row, (token, value) in enumerate(zip(pick(scores, {"temperature": temperature}), best, strict=True)):
            assert scores[row, token] == value


def test_a_broken_neighbour_changes_no_draw():
    torch.manual_seed(0)
    scores = torch.randn(3, N_TOKENS)
    for settings in SETTINGS:
        alone = pick(scores, settings)
        broken = scores.clone()
        broken[1] = math.nan
        assert pick(broken, settings)[::2] == alone[::2]


def small(**kwargs):
    torch.manual_seed(0)
    blocks = [{"pattern": [{"mixer": {"name": "LinearAttention", "n_heads": 2}}]}]
    return LM(LMConfig(d_model=16, vocab_size=256, blocks=blocks, **kwargs)).eval()


def breaking(model, row, at):
    """The model with scores of NaN for one sequence in one call."""
    calls, forward = [], model.forward

    def broken(*args, **kwargs):
        scores, state = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) == at:
            scores[row] = math.nan
        return scores, state

    model.forward = broken
    return model


def test_scores_of_nan_end_a_sequence_and_no_other():
    prompts = [b"one", b"two", b"six"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = generate(small(), prompts, max_new_tokens=9)
    with pytest.warns(UserWarning, match=r"scores are NaN .*text 2 after 4 tokens\)"):
        found = generate(breaking(small(), 1, at=6), prompts, max_new_tokens=9)
    assert found[::2] == whole[::2]
    assert whole[1].startswith(found[1])


def test_a_context_whose_sequence_broke_is_saved(tmp_path):
    model = breaking(small(), 0, at=4)
    context = Context.start(model, [torch.tensor([1], dtype=torch.int32)], [0], 8)
    assert len(list(decode(context, Sampling(), 8, park=True))) == 4
    assert context.broken == {0} and context.finished == [True]
    context.save(tmp_path / "state")
    assert len(Context.load(tmp_path / "state", small(), max_new_tokens=2).unread[0]) == 1
