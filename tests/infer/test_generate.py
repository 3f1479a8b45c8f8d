"""The loop: however prompts are batched, cut, forked or interrupted, the tokens are the same. All in float64."""

import numpy as np
import pytest
import torch

from subquad.errors import UserError
from subquad.infer.generate import Context, Generation, decode, encode, generate
from subquad.infer.sampling import Sampling
from subquad.infer.state import nbytes
from subquad.kernels.state import leaves
from subquad.models.tokenizer import ByteTokenizer

PROMPTS = [b"a prompt of one length", b"x", "and another, l\u00f6nger than the first two".encode(), b"ab"]
SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2}


def tokens_of(model, prompts, seeds, n=12, chunk=4096, settings=SAMPLED, context=None):
    """The generated tokens of each prompt, and the context they leave."""
    tokenizer = ByteTokenizer()
    if context is None:
        context = Context.start(model, [encode(tokenizer, p, 256) for p in prompts], seeds, n)
    for _ in context.read(chunk):
        pass
    generation = Generation(context, tokenizer, Sampling(**settings), max_new_tokens=n)
    for _ in generation:
        pass
    return generation.tokens, context


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_in_a_batch_as_alone(model, settings):
    together, _ = tokens_of(model, PROMPTS, [5, 6, 7, 8], settings=settings)
    alone = [tokens_of(model, [p], [5 + i], settings=settings)[0][0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert all(len(t) == 12 for t in alone)


@pytest.mark.parametrize("chunk", [3, 16])
def test_prefill_in_chunks_as_at_once(model, chunk):
    assert tokens_of(model, PROMPTS, [5, 6, 7, 8], chunk=chunk)[0] == tokens_of(model, PROMPTS, [5, 6, 7, 8])[0]


def test_samples_as_separate_runs(model):
    texts = generate(model, PROMPTS[0], max_new_tokens=10, num_samples=3, seed=20, **SAMPLED)
    alone = [generate(model, PROMPTS[0], max_new_tokens=10, seed=20 + i, **SAMPLED) for i in range(3)]
    assert texts == alone
    assert len(set(texts)) == 3


def test_a_saved_context_goes_on_as_without_the_break(model, tmp_path):
    whole, _ = tokens_of(model, PROMPTS, [5, 6, 7, 8], n=14)
    first, context = tokens_of(model, PROMPTS, [5, 6, 7, 8], n=5)
    context.save(tmp_path / "s")
    again = Context.load(tmp_path / "s", model, max_new_tokens=9)
    assert again.lengths == [len(p) + 4 for p in PROMPTS]  # the fifth new token is not read yet
    second, _ = tokens_of(model, PROMPTS, None, n=9, context=again)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


def test_a_context_saved_within_the_prompt_goes_on(model, tmp_path):
    whole, _ = tokens_of(model, PROMPTS, [5, 6, 7, 8])
    context = Context.start(model, [encode(ByteTokenizer(), p, 256) for p in PROMPTS], [5, 6, 7, 8], 0)
    next(iter(context.read(15)))
    assert context.lengths == [15, 0, 0, 0]
    context.save(tmp_path / "s")
    again = Context.load(tmp_path / "s", model, max_new_tokens=12)
    assert [bytes(b.tolist()) for b in again.before] == [PROMPTS[0][:15], b"", b"", b""]  # what text may begin within
    assert tokens_of(model, PROMPTS, None, context=again)[0] == whole


def test_more_text_after_a_saved_context(models, tmp_path):
    model = models["hybrid"]
    first, context = tokens_of(model, PROMPTS[:1], [5], n=6)
    context.save(tmp_path / "s")
    more = encode(ByteTokenizer(), b" and more", 256)
    again = Context.load(tmp_path / "s", model, more=more, max_new_tokens=7)
    going_on, _ = tokens_of(model, None, None, n=7, settings={}, context=again)
    assert going_on == tokens_of(model, [PROMPTS[0] + bytes(first[0]) + b" and more"], [0], n=7, settings={})[0]


def test_a_sequence_that_ends_leaves_the_others_alone(model, tmp_path):
    """Each ends at its own step; what is kept of it is its state when it ended."""
    whole, _ = tokens_of(model, PROMPTS, [5, 6, 7, 8])
    context = Context.start(model, [encode(ByteTokenizer(), p, 256) for p in PROMPTS], [5, 6, 7, 8], 12)
    list(context.read())
    found = [[] for _ in PROMPTS]
    ends = [3, 12, 1, 6]
    for step in decode(context, Sampling(**SAMPLED), 12, park=True):
        for i, token in step.items():
            found[i].append(token)
            context.finished[i] = len(found[i]) == ends[i]
    assert found == [tokens[:end] for tokens, end in zip(whole, ends, strict=True)]
    for i, end in enumerate(ends):
        _, alone = tokens_of(model, PROMPTS[i : i + 1], [5 + i], n=end)
        for (path, kind, mine), (_, _, wanted) in zip(leaves(context.whole()), leaves(alone.state), strict=True):
            upto = alone.lengths[0] if kind == "append" else None
            torch.testing.assert_close(
                mine[i : i + 1][:, :upto] if upto else mine[i : i + 1],
                wanted[:, :upto] if upto else wanted,
                rtol=1e-9,
                atol=1e-11,
                msg=path,
            )
    assert context.finished == [True, True, True, True] and len(context.live) < 4
    context.save(tmp_path / "s")
    again = Context.load(tmp_path / "s", model, max_new_tokens=5)
    assert again.finished == [True, True, True, True]
    assert list(decode(again, Sampling(), 5)) == []


def test_a_state_that_was_let_go_is_not_made_up(models, tmp_path):
    context = Context.start(models["linear"], [torch.tensor([1, 2]), torch.tensor([3])], [5, 6], 3)
    list(context.read())
    for _ in decode(context, Sampling(), 3):
        context.finished[0] = True
    with pytest.raises(UserError, match="decode with park=True"):
        context.save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_the_end_token_ends_a_text_and_is_not_part_of_it(models):
    class Ending(ByteTokenizer):
        eos_id = None

    tokenizer, model = Ending(), models["linear"]
    tokens = tokens_of(model, PROMPTS[:1], [5], n=12, settings={})[0][0]
    tokenizer.eos_id = tokens[4]
    upto = tokens.index(tokens[4])
    context = Context.start(model, [encode(tokenizer, PROMPTS[0], 256)], [5], 12)
    list(context.read())
    generation = Generation(context, tokenizer, Sampling(), max_new_tokens=12)
    list(generation)
    assert generation.tokens == [tokens[:upto]]
    assert context.finished == [True]


def test_stop_strings_end_each_text_before_them(models):
    model = models["mamba2"]
    full = generate(model, [b"one", b"two"], max_new_tokens=40, temperature=1.0, seed=3)
    stop = [full[0][7:9], full[1][20:23]]
    wanted = [text[: min(at for word in stop if (at := text.find(word)) >= 0)] for text in full]
    pieces = {0: "", 1: ""}

    def hear(i, piece):
        pieces[i] += piece

    texts = generate(model, [b"one", b"two"], max_new_tokens=40, temperature=1.0, seed=3, stop=stop, on_text=hear)
    assert texts == wanted == [pieces[0], pieces[1]]


def test_tokens_arrays_and_text_are_the_same_prompt(models):
    model = models["linear"]
    forms = ["hej", b"hej", list(b"hej"), np.frombuffer(b"hej", np.uint8), torch.tensor(list(b"hej"))]
    assert len({generate(model, form, max_new_tokens=5) for form in forms}) == 1
    assert generate(model, forms, max_new_tokens=5) == [generate(model, "hej", max_new_tokens=5)] * 5
    assert generate(model, "hej", max_new_tokens=0) == ""


def test_a_training_model_generates_in_eval_mode_and_is_put_back(small):
    model = small("hybrid").train()
    modes = []
    model.blocks[0].register_forward_hook(lambda *args: modes.append(model.training))
    generate(model, "abc", max_new_tokens=2)
    assert modes and not any(modes)
    assert model.training


def test_decoding_writes_in_place(model):
    context = Context.start(model, [encode(ByteTokenizer(), p, 256) for p in PROMPTS], [1, 2, 3, 4], 6)
    list(context.read(7))
    addresses = [t.data_ptr() for _, _, t in leaves(context.state)]
    assert len(list(decode(context, Sampling(), 6))) == 6
    assert [t.data_ptr() for _, _, t in leaves(context.state)] == addresses


@pytest.mark.parametrize("name", ["linear", "mamba", "mamba2", "delta", "window"])
def test_a_constant_state_allocates_nothing_by_length(models, name):
    prompt = encode(ByteTokenizer(), b"abc", 256)
    sizes = [nbytes(Context.start(models[name], [prompt], [0], n).state) for n in (1, 10**12)]
    assert sizes[0] == sizes[1]


def test_prefill_asks_for_the_last_logits_only(models):
    shapes = []
    model = models["linear"]
    hook = model.head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    generate(model, [b"x" * 50, b"y" * 30], max_new_tokens=1, prefill_chunk=32)
    hook.remove()
    assert shapes == [(2, 256)] * 4  # 78 prompt tokens in three calls, one step


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"prompts": ""}, "the prompt is empty"),
        ({"prompts": ["a", b""]}, "the prompt is empty"),
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [1, 256]}, "token 256 at position 1 is outside the model's vocabulary of 256"),
        ({"prompts": [1, -1]}, "token -1 at position 1 is outside"),
        ({"prompts": torch.zeros(2, 2)}, r"a vector of integers; got torch.float32 \(2, 2\)"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p is 1.5; it must be between 0 and 1"),
        ({"top_p": 0.9}, "top_p 0.9 has no effect at temperature 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be at least 0.001"),
        ({"num_samples": 2}, "num_samples 2 at temperature 0"),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; it must be at least 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0; it must be at least 1"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"seed": -3}, "seed is -3; it must be between"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(models, arguments, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        generate(models["linear"], **({"prompts": "abc"} | arguments))
    assert "\n" not in str(caught.value)


def test_a_model_that_reads_the_whole_sequence_cannot_generate(small):
    pattern = [{"mixer": {"name": "LinearAttention", "n_heads": 2, "causal": False}}]
    with pytest.raises(UserError, match="block 0's LinearAttention cannot decode"):
        generate(small("linear", blocks=[{"pattern": pattern}]), "abc")


def test_a_vocabulary_that_is_not_bytes_needs_a_tokenizer(small):
    with pytest.raises(UserError, match="vocabulary of 300; give its tokenizer"):
        generate(small("linear", vocab_size=300), "abc")
    assert generate(small("linear", vocab_size=300), "abc", tokenizer="bytes", max_new_tokens=2) is not None


class TestSampling:
    scores = torch.tensor([[2.0, 1.0, 0.5, -1.0, float("-inf")], [0.1, 0.2, 0.3, 0.4, 0.5]])
    seen = torch.tensor([[True, False, False, True, False], [False] * 5])

    def draw(self, n=4000, **settings):
        sampling = Sampling(temperature=settings.pop("temperature", 1.0), **settings)
        chance = torch.Generator().manual_seed(1)
        drawn = sampling.pick(self.scores.repeat(n, 1), self.seen.repeat(n, 1), [chance] * 2 * n)
        return torch.stack([drawn[i::2].bincount(minlength=5) / n for i in (0, 1)])

    def wanted(self, settings):
        """The distribution by the definitions, written out."""
        rows = []
        for scores, seen in zip(self.scores.tolist(), self.seen.tolist(), strict=True):
            penalty = settings.get("repetition_penalty", 1.0)
            x = [(s * penalty if s < 0 else s / penalty) if known else s for s, known in zip(scores, seen, strict=True)]
            p = (torch.tensor(x) / settings.get("temperature", 1.0)).softmax(0)
            order = p.argsort(descending=True).tolist()
            keep = set(order[: settings.get("top_k", 5)])
            p = torch.tensor([v if i in keep else 0 for i, v in enumerate(p.tolist())])
            p /= p.sum()
            total, nucleus = 0.0, set()
            for i in order:
                if total < settings.get("top_p", 1.0):
                    nucleus.add(i)
                total += float(p[i])
            p = torch.tensor([v if i in nucleus else 0 for i, v in enumerate(p.tolist())])
            p = torch.where(p >= settings.get("min_p", 0.0) * p.max(), p, 0)
            rows.append(p / p.sum())
        return torch.stack(rows)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"temperature": 0.5},
            {"top_k": 2},
            {"top_p": 0.7},
            {"min_p": 0.5},
            {"repetition_penalty": 3.0},
            {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
        ],
        ids=str,
    )
    def test_frequencies(self, settings):
        found, wanted = self.draw(**settings), self.wanted(settings)
        assert torch.equal(found > 0, wanted > 0)
        assert (found - wanted).abs().max() < 0.035  # 4 standard deviations of 4,000 draws

    def test_greedy_takes_the_likeliest_after_the_penalty(self):
        assert Sampling().pick(self.scores, self.seen, []).tolist() == [0, 4]
        assert Sampling(repetition_penalty=3.0).pick(self.scores, self.seen, []).tolist() == [1, 4]

    def test_a_token_of_probability_zero_is_never_drawn(self):
        scores = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
        for value, token in ((0.0, 3), (1 - 2**-53, 1)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "rand", lambda *a, value=value, **k: torch.tensor(value, dtype=torch.float64))
                assert Sampling(temperature=1.0).pick(scores, self.seen[:1], [torch.Generator()]).tolist() == [token]
