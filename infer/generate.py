"""One generation loop for every architecture: read the prompts, then one token a sequence and step.

A run is `Context` (where the sequences are), `Context.read` (prefill, in chunks) and `decode` (the loop); `Generation`
adds text, stop strings and samples around them, and `generate` is that in one call.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from subquad.errors import UserError, one_line
from subquad.infer.sampling import NO_TOKEN, Sampling, generator, seeds_from
from subquad.infer.state import concatenate, fork, load_state, save_state, select
from subquad.infer.text import TextStream, stop_strings
from subquad.kernels.packing import cu_seqlens_of, sequence_ids
from subquad.layers.base import device_of
from subquad.models.checkpoint import load
from subquad.models.lm import LM, LMState
from subquad.models.tokenizer import CONTEXT, ByteTokenizer, Tokenizer, load_tokenizer

Prompt = str | bytes | Tensor | np.ndarray | Sequence[int]
PREFILL_CHUNK = 4096
SAVED = {"unread", "unread_lengths", "lengths", "seen", "generators", "finished"}


@dataclass
class Context:
    """Where sequences are: what they have read is in the state, what they have not read yet in `unread`.

    The last token sampled is one that is not read yet, so stopping between two steps, or between two chunks of the
    prompt, leaves nothing else to remember.
    """

    model: LM
    state: LMState  # of the live sequences, in order
    unread: list[Tensor]  # int32, at least one token each
    lengths: list[int]  # tokens read
    seen: Tensor  # bool [N, V], the tokens read
    generators: list[torch.Generator]
    finished: list[bool]
    before: list[Tensor] = field(default_factory=list)  # the last tokens read, which the text that follows depends on
    broken: set[int] = field(init=False, default_factory=set)  # sequences that ended for want of a score
    live: list[int] = field(init=False)
    parked: dict[int, LMState] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.live = list(range(len(self.unread)))
        self.before = self.before or [u[:0] for u in self.unread]

    @classmethod
    def start(cls, model: LM, prompts: list[Tensor], seeds: list[int], max_new_tokens: int) -> "Context":
        """Before the first token of each prompt, with room for all of them and `max_new_tokens` more."""
        n, device = len(prompts), device_of(model)
        state = model.init_state(n, max(len(p) for p in prompts) + max_new_tokens)
        seen = torch.zeros(n, model.config.vocab_size, dtype=torch.bool, device=device)
        return cls(model, state, list(prompts), [0] * n, seen, [generator(s) for s in seeds], [False] * n)

    def extend(self, more: Tensor) -> None:
        """More text for every sequence to read; one that had ended goes on."""
        self.unread = [torch.cat([u, more]) for u in self.unread]
        self.finished = [False] * len(self.unread)

    def read(self, chunk: int = PREFILL_CHUNK) -> Iterator[int]:
        """Read all but the last unread token of each sequence, at most `chunk` tokens a call; yields how many it read.

        The sequences are read one after the other, the end of one packed in a row with the start of the next.
        """
        while any(len(u) > 1 for u in self.unread):
            left, counts = chunk, []
            for u in self.unread:
                counts.append(min(len(u) - 1, left))
                left -= counts[-1]
            row = torch.cat([u[:count] for u, count in zip(self.unread, counts, strict=True)])
            tokens, boundaries = self._on_device(row), cu_seqlens_of(torch.tensor(counts, device=self.seen.device))
            self._forward(tokens[None], boundaries if len(counts) > 1 else None)
            self.seen[sequence_ids(len(tokens), boundaries)[0], tokens] = True
            for i, count in enumerate(counts):
                self._advance(i, count)
            yield len(row)

    def step(self) -> Tensor:
        """Read the one unread token of each live sequence; gives the scores of the next, [live, V]."""
        tokens = self._on_device(torch.stack([self.unread[i] for i in self.live]))
        scores = self._forward(tokens)
        self.seen[torch.tensor(self.live, device=tokens.device), tokens[:, 0]] = True
        for i in self.live:
            self._advance(i, 1)
        return scores

    def narrow(self, *, park: bool) -> None:
        """Leave finished sequences out of the following steps; `park` keeps their states for `whole`."""
        stay = [i for i in self.live if not self.finished[i]]
        if stay == self.live:
            return
        for row, i in enumerate(self.live):
            if park and self.finished[i]:
                self.parked[i] = select(self.state, [row])
        self.state = select(self.state, [self.live.index(i) for i in stay])
        self.live = stay

    def whole(self) -> LMState:
        """The state of all sequences, those that ended too."""
        n = len(self.unread)
        if len(self.live) == n:
            return self.state
        parts = {i: select(self.state, [row]) for row, i in enumerate(self.live)} | self.parked
        if len(parts) < n:
            raise UserError("the states of sequences that ended were not kept; decode with park=True to have them all")
        return concatenate([parts[i] for i in range(n)])

    def fork(self, n: int, seeds: list[int]) -> "Context":
        """Each sequence n times, from one reading of its prompt."""
        each = [i for i in range(len(self.unread)) for _ in range(n)]
        return Context(
            self.model,
            fork(self.state, n),
            [self.unread[i] for i in each],
            [self.lengths[i] for i in each],
            self.seen.repeat_interleave(n, 0),
            [generator(s) for s in seeds],
            [self.finished[i] for i in each],
            [self.before[i] for i in each],
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write everything that going on takes."""
        extra = {
            "unread": torch.cat(self.unread),
            "unread_lengths": torch.tensor([len(u) for u in self.unread]),
            "lengths": torch.tensor(self.lengths),
            "seen": self.seen,
            "generators": torch.stack([g.get_state() for g in self.generators]),
            "finished": torch.tensor(self.finished),
            "before": torch.cat(self.before),
            "before_lengths": torch.tensor([len(b) for b in self.before]),
        }
        save_state(path, self.model, self.whole(), extra=extra, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, model: LM, *, more: Tensor | None = None, max_new_tokens: int = 0) -> "Context":
        """Go on from a file, every sequence with the text `more` and then room for `max_new_tokens`."""

        def room(extra: dict[str, Tensor]) -> int:
            if not extra.keys() >= SAVED:
                raise UserError(f"{path} holds a state alone; only what a generation saved says what comes next")
            _check_saved(path, extra, model.config.vocab_size)
            longest = int((extra["lengths"] + extra["unread_lengths"]).max())
            return longest + (0 if more is None else len(more)) + max_new_tokens

        try:
            state, extra = load_state(path, model, room=room)
            generators = [torch.Generator() for _ in extra["generators"]]
            for g, values in zip(generators, extra["generators"], strict=True):
                g.set_state(values.clone())  # torch 2.13 reads a row of a matrix from the wrong address and crashes
            unread = list(extra["unread"].split(extra["unread_lengths"].tolist()))
            seen = extra["seen"].to(device_of(model))
            lengths, finished = extra["lengths"].tolist(), extra["finished"].tolist()
            before = []
            if "before" in extra and "before_lengths" in extra:  # files of version 0.1.0 hold none
                before = list(extra["before"].split(extra["before_lengths"].tolist()))
        except UserError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # of values that nothing here wrote
            raise UserError(f"{path} is damaged: {one_line(error)}") from error
        context = cls(model, state, unread, lengths, seen, generators, finished, before)
        if more is not None:
            context.extend(more)
        return context

    @torch.no_grad()
    def _forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        scores, self.state = self.model(tokens, self.state, cu_seqlens, logits="last")
        return scores

    def _on_device(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.seen.device, torch.long)

    def _advance(self, i: int, count: int) -> None:
        self.before[i] = torch.cat([self.before[i], self.unread[i][:count].cpu()])[-CONTEXT:]
        self.unread[i] = self.unread[i][count:]
        self.lengths[i] += count


def _check_saved(path: str | Path, extra: dict[str, Tensor], vocab_size: int) -> None:
    """Refuse what no generation wrote, before anything is done with it: torch crashes on a generator's bad state."""
    n, words = extra["lengths"].numel(), torch.Generator().get_state().numel()
    shapes = {"lengths": (n,), "unread_lengths": (n,), "finished": (n,), "seen": (n, vocab_size)}
    shapes |= {"generators": (n, words), "before_lengths": (n,)}
    dtypes = {"finished": torch.bool, "seen": torch.bool, "generators": torch.uint8}
    dtypes |= {"unread": torch.int32, "before": torch.int32}
    for name in shapes.keys() | dtypes.keys():
        if name not in extra:  # files of version 0.1.0 hold no `before`
            continue
        tensor = extra[name]
        shape, dtype = shapes.get(name, (tensor.numel(),)), dtypes.get(name, torch.int64)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise UserError(f"{path} is damaged: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
    for name, least in (("unread", 1), ("before", 0)):
        counts, tokens = extra.get(f"{name}_lengths"), extra.get(name)
        if counts is None or tokens is None:
            continue
        if not n or int(counts.min()) < least or counts.double().sum() != tokens.numel():
            raise UserError(f"{path} is damaged: {name}_lengths does not divide its {tokens.numel()} tokens")
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
            raise UserError(f"{path} is damaged: {name} holds a token outside the vocabulary of {vocab_size}")
    if int(extra["lengths"].min()) < 0 or int(extra["lengths"].max()) > 2**48:
        raise UserError(f"{path} is damaged: lengths holds {int(extra['lengths'].max())}, no number of tokens read")
    for state in extra["generators"]:
        try:
            torch.Generator().set_state(state.clone())
        except RuntimeError as error:
            raise UserError(f"{path} is damaged: generators holds no state of a random generator") from error


def decode(
    context: Context, sampling: Sampling, max_new_tokens: int, *, eos_id: int | None = None, park: bool = False
) -> Iterator[dict[int, int]]:
    """The loop: each step reads one token a live sequence and yields the next, {sequence: token}.

    A sequence ends with `eos_id`, which is not yielded, or when the caller sets its `context.finished`, or where the
    model gives no score that is a number: then it is in `context.broken`, and the others go on.
    """
    for _ in range(max_new_tokens):
        context.narrow(park=park)
        if not context.live:
            return
        scores = context.step()
        tokens = sampling.pick(scores, context.seen[context.live], [context.generators[i] for i in context.live])
        found = dict(zip(context.live, tokens.tolist(), strict=True))
        for i, token in found.items():
            if token == NO_TOKEN:
                context.broken.add(i)
            context.unread[i] = torch.tensor([max(token, 0)], dtype=torch.int32)  # a state holds what to read next
            context.finished[i] = token in (eos_id, NO_TOKEN)
        yield {i: token for i, token in found.items() if token not in (eos_id, NO_TOKEN)}


class Generation:
    """Text from a context whose prompts are read: iterating gives (sequence, text) as it comes.

    It may be left off between any two: `context` is then where it stands, `texts` is what was generated, and `finish`
    gives what was held back.
    """

    def __init__(
        self,
        context: Context,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        park: bool = False,
    ):
        self.context, self.tokenizer, self.sampling = context, tokenizer, sampling
        self.max_new_tokens, self.stop, self.park = max_new_tokens, stop, park
        n = len(context.unread)
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self._pieces: list[list[str]] = [[] for _ in range(n)]
        read = [torch.cat([b, u.cpu()])[-CONTEXT:] for b, u in zip(context.before, context.unread, strict=True)]
        self._streams = [TextStream(tokenizer, stop, before=tokens.tolist()) for tokens in read]

    @property
    def texts(self) -> list[str]:
        return ["".join(pieces) for pieces in self._pieces]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        context = self.context
        steps = decode(context, self.sampling, self.max_new_tokens, eos_id=self.tokenizer.eos_id, park=self.park)
        for step in steps:
            for i, token in step.items():
                self.tokens[i].append(token)
                piece = self._streams[i].push(token)
                context.finished[i] = self._streams[i].stopped
                yield from self._say(i, piece)
        yield from self.finish()

    @property
    def broken(self) -> str | None:
        """One sentence on the sequences that ended because the model's scores are not numbers, if there are any."""
        if not self.context.broken:
            return None
        which = ", ".join(f"text {i + 1} after {len(self.tokens[i])} tokens" for i in sorted(self.context.broken))
        return f"the model's scores are NaN or -infinity, so there is no next token ({which}); try a wider --dtype"

    def finish(self) -> Iterator[tuple[int, str]]:
        """What is held back of a character or a stop string, once no more tokens come."""
        for i, stream in enumerate(self._streams):
            yield from self._say(i, stream.finish())

    def _say(self, i: int, piece: str) -> Iterator[tuple[int, str]]:
        if piece:
            self._pieces[i].append(piece)
            yield i, piece


def generate(
    model: LM | str | Path,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    num_samples: int = 1,
    prefill_chunk: int = PREFILL_CHUNK,
    tokenizer: Tokenizer | str | Path | None = None,
    on_text: Callable[[int, str], object] | None = None,
) -> str | list[str]:
    """Continue one prompt or several; returns what was generated, without the prompts.

    A list of texts for several prompts or samples, the samples of a prompt next to each other; otherwise one text.

    Arguments
        model: an LM or the folder of one.
        prompts: text, bytes or tokens (a list, array or tensor), or a list of these; lengths may differ.
        max_new_tokens: the most tokens to generate for each.
        temperature, top_k, top_p, min_p, repetition_penalty: see `subquad.infer.sampling.Sampling`; greedy by default.
        stop: strings that end a text and are not part of it.
        seed: sequence i draws from seed + i, whatever is in the batch with it; by default a new seed each time.
        num_samples: texts a prompt, from one reading of it.
        prefill_chunk: tokens of prompt in one call of the model, which bounds the memory.
        tokenizer: of the model; by default the one in its folder, and bytes for an LM with a vocabulary of 256.
        on_text: called with (sequence, text) as text comes.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    check_counts(sampling, max_new_tokens, num_samples, prefill_chunk)
    words = stop_strings(stop)
    if not isinstance(model, LM):
        tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
        model = load(model)
    tokenizer = _tokenizer_of(model, tokenizer)
    single = isinstance(prompts, str | bytes | Tensor | np.ndarray) or (bool(prompts) and isinstance(prompts[0], int))
    several = cast(Sequence[Prompt], [prompts] if single else prompts)
    rows = [encode(tokenizer, p, model.config.vocab_size) for p in several]
    if not rows:
        raise UserError("there is no prompt; give at least one")
    training = model.training
    model.eval()
    try:
        context = Context.start(model, rows, seeds_from(seed, len(rows)), max_new_tokens)
        for _ in context.read(prefill_chunk):
            pass
        if num_samples > 1:
            context = context.fork(num_samples, seeds_from(seed, len(rows) * num_samples))
        generation = Generation(context, tokenizer, sampling, max_new_tokens=max_new_tokens, stop=words)
        for i, piece in generation:
            if on_text is not None:
                on_text(i, piece)
    finally:
        model.train(training)
    if generation.broken:
        warnings.warn(generation.broken, stacklevel=2)
    return generation.texts[0] if single and num_samples == 1 else generation.texts


def encode(tokenizer: Tokenizer, prompt: Prompt, vocab_size: int) -> Tensor:
    """A prompt's tokens, int32, all of them within the vocabulary."""
    if isinstance(prompt, str | bytes):
        if isinstance(tokenizer, ByteTokenizer) and isinstance(prompt, bytes):
            tokens = torch.from_numpy(np.frombuffer(prompt, np.uint8).astype(np.int32))  # no list of 8 bytes an entry
        else:
            tokens = torch.tensor(tokenizer.encode(prompt), dtype=torch.int32)
    else:
        tokens = torch.as_tensor(np.array(prompt) if isinstance(prompt, np.ndarray) else prompt)
        if tokens.dim() != 1 or (tokens.numel() and (tokens.is_floating_point() or tokens.dtype == torch.bool)):
            raise UserError(f"a prompt of tokens is a vector of integers; got {tokens.dtype} {tuple(tokens.shape)}")
        tokens = tokens.cpu().long()  # a uint8 tensor takes 256 for 0 where it is compared with it
    if not tokens.numel():
        raise UserError("the prompt is empty; give at least one token to go on from")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        at = int(((tokens < 0) | (tokens >= vocab_size)).int().argmax())
        raise UserError(f"token {int(tokens[at])} at position {at} is outside the model's vocabulary of {vocab_size}")
    return tokens.to(torch.int32)


def check_counts(sampling: Sampling, max_new_tokens: int, num_samples: int, prefill_chunk: int) -> None:
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("num_samples", num_samples, 1),
        ("prefill_chunk", prefill_chunk, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    if num_samples > 1 and sampling.greedy:
        raise UserError(f"num_samples {num_samples} at temperature 0 would all be one text; give a temperature above 0")


def _tokenizer_of(model: LM, tokenizer: Tokenizer | str | Path | None) -> Tokenizer:
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(tokenizer)
    if tokenizer is None:
        if model.config.vocab_size != 256:
            raise UserError(f"the model has a vocabulary of {model.config.vocab_size}; give its tokenizer")
        return ByteTokenizer()
    return tokenizer
