"""The LightningDataModule: text files in, packed rows out, in an order that can be resumed exactly."""

import sys
from collections.abc import Iterator
from typing import Any, get_type_hints

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only

from subquad.errors import UserError
from subquad.layers.build import check_range, check_type
from subquad.models.tokenizer import Tokenizer, load_tokenizer
from subquad.train.corpus import (
    Document,
    Tokens,
    expand,
    gzip_bits_per_byte,
    read_files,
    split,
    standard_library,
    tokenize,
)
from subquad.train.rows import Batch, Rows


class TextData(LightningDataModule):
    """Text as packed rows of tokens.

    Args:
        files: paths and globs to train on; by default Python's own standard library source.
        val_files: what to validate on; by default a part of `files` (see val_fraction).
        test_files: what `test` reads.
        val_fraction: part of the bytes that is validation: whole files if there are at least 20 and small ones suffice
            for it, else the end of each.
        tokenizer: 'bytes', or a Hugging Face tokenizer's file or folder.
        eos: the token that ends a document, where the tokenizer's files name another or none.
        special_tokens: let a text that spells a special token become it; else it is plain text.
        context: longest sequence; longer documents are cut.
        batch_tokens: tokens in a row, per process and step.
        truncate: truncated backpropagation: read this many tokens of a sequence a step and carry the state to the next
            step, so that gradients reach back `truncate` tokens while the state reaches back `context`.
        seed: of the order of the data.
        cache: folder for tokens; by default the user's cache folder.
    """

    def __init__(
        self,
        files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        val_fraction: float = 0.05,
        tokenizer: str = "bytes",
        context: int = 1024,
        batch_tokens: int = 8192,
        truncate: int | None = None,
        seed: int = 0,
        cache: str | None = None,
        eos: str | None = None,
        special_tokens: bool = False,
    ):
        super().__init__()
        hints = get_type_hints(TextData.__init__)
        counts = {"context": context, "batch_tokens": batch_tokens, "truncate": truncate}
        for name, value in (counts | {"val_fraction": val_fraction, "seed": seed}).items():
            check_type(f"data.{name}", value, hints[name])
        for name, value in counts.items():
            if value is not None:
                check_range(f"data.{name}", value, 1)
        if truncate is not None and (batch_tokens % truncate or truncate > context):
            raise UserError(
                f"data.truncate is {truncate}; it must divide batch_tokens {batch_tokens}, within context {context}"
            )
        if not 0 < val_fraction < 1:
            raise UserError(f"data.val_fraction is {val_fraction}; it must be above 0 and below 1")
        if seed < 0:
            raise UserError(f"data.seed is {seed}; it must not be negative")
        self.files, self.val_files, self.test_files, self.val_fraction = files, val_files, test_files, val_fraction
        self.tokenizer_spec, self.context, self.batch_tokens, self.truncate = tokenizer, context, batch_tokens, truncate
        self.seed, self.cache = seed, cache
        self.splits: dict[str, tuple[list[Document], Tokens]] = {}
        self._gzip: dict[str, float] = {}
        self.eos, self.special_tokens = eos, special_tokens
        self._tokenizer: Tokenizer | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_spec, eos=self.eos, special_tokens=self.special_tokens)
            if self._tokenizer.eos_id is None and self._tokenizer.kind != "bytes":
                rank_zero_only(print)(
                    f"the tokenizer {self.tokenizer_spec!r} has no end-of-text token, so documents are not separated; "
                    "name one with data.eos",
                    file=sys.stderr,
                )
        return self._tokenizer

    def check_vocabulary(self, vocab_size: int) -> None:
        """One sentence where the model has no row for some of the tokenizer's tokens."""
        if self.tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"model.lm.vocab_size is {vocab_size}, but the tokenizer {self.tokenizer_spec!r} has "
                f"{self.tokenizer.vocab_size} tokens; set vocab_size to at least that"
            )

    def setup(self, stage: str) -> None:
        """Read, split and tokenize the files (once; the cache makes the next time quick)."""
        wanted = ["test"] if stage == "test" else ["val"] if stage == "validate" else ["train", "val"]
        if all(name in self.splits for name in wanted):
            return
        for name, documents in (self._test() if stage == "test" else self._train_and_val()).items():
            tokens = tokenize(documents, self.tokenizer, self.cache)
            if not tokens.n_targets:
                raise UserError(f"the {name} text has {tokens.n_bytes} bytes, too little; give more files")
            self.splits[name] = documents, tokens
            if name != "train":  # now, for the files may be gone or others when the run ends
                self._gzip[name] = gzip_bits_per_byte(documents)

    def _train_and_val(self) -> dict[str, list[Document]]:
        files = read_files(standard_library() if self.files is None else expand(self.files, "data.files"))
        if self.val_files is None:
            train, val = split(files, self.val_fraction)
        else:
            held_out = read_files(expand(self.val_files, "data.val_files"))
            seen = {f.digest for f in held_out}
            train = [Document(f, 0, f.size) for f in files if f.digest not in seen]
            val = [Document(f, 0, f.size) for f in held_out]
        return {"train": train, "val": val}

    def _test(self) -> dict[str, list[Document]]:
        if self.test_files is None:
            raise UserError("data.test_files is not given; name the files to test on")
        return {"test": [Document(f, 0, f.size) for f in read_files(expand(self.test_files, "data.test_files"))]}

    def gzip_bits_per_byte(self, name: str) -> float:
        """Of `gzip -9` on one split's text, the figure to read a model's beside."""
        return self._gzip[name]

    def describe(self) -> str:
        """One line on what is trained and validated on."""
        parts = [f"{name} {tokens.n_bytes / 1e6:.2f} MB in {len(docs)}" for name, (docs, tokens) in self.splits.items()]
        source = "Python's standard library" if self.files is None else "your files"
        within = any(document.start for document in self.splits["val"][0])
        how = "the end of each file is validation" if within else "split by file"
        return f"{source}: {', '.join(parts)} documents ({how})"

    def rows(self, name: str, *, shuffle: bool) -> Rows:
        """One split's rows for this process."""
        trainer = self.trainer
        return Rows(
            self.splits[name][1],
            context=self.context,
            row=self.batch_tokens,
            streams=1 if self.truncate is None else self.batch_tokens // self.truncate,
            carry=self.truncate is not None,
            seed=self.seed if shuffle else None,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
        )

    def train_dataloader(self) -> "TrainRows":
        return TrainRows(self)

    def val_dataloader(self) -> "EpochRows":
        return EpochRows(self.rows("val", shuffle=False))

    def test_dataloader(self) -> "EpochRows":
        return EpochRows(self.rows("test", shuffle=False))

    def position(self) -> int:
        """Rows trained on so far, over all epochs: the number of the next one."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0

    def _order(self) -> dict[str, Any]:
        """All that the order of the training tokens follows from, by the option that sets it."""
        return {
            "seed": self.seed,
            "tokens": len(self.splits["train"][1].tokens),
            "text": self.splits["train"][1].digest,
            "context": self.context,
            "batch_tokens": self.batch_tokens,
            "truncate": self.truncate,
            "processes": self.trainer.world_size if self.trainer else 1,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position(), **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a checkpoint's position, which is one of the same rows alone: of any others it would skip or repeat
        text."""
        if self.trainer and self.trainer.state.fn != "fit":  # what is evaluated may be any text
            return
        for name, value in self._order().items():
            known = state.get(name, value)  # checkpoints of version 0.1.0 hold the first two
            if known == value:
                continue
            raise UserError(
                f"the data changed: the checkpoint was trained with {name} {known}, here it is {value}; its place in "
                "the text holds for the same files, tokenizer, seed, context, batch_tokens, truncate and processes"
            )
        self._restored = state


class EpochRows:
    """One pass over all rows."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return self.rows.per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return (self.rows[i] for i in range(len(self)))


class TrainRows(EpochRows):
    """Rows without end from the next untrained one on; an epoch's length is what Lightning counts epochs by."""

    def __init__(self, data: TextData):
        super().__init__(data.rows("train", shuffle=True))
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        restored = self.data._restored
        position = self.data.position() if restored is None else restored["position"]
        self.data._restored = None
        while True:
            yield self.rows[position]
            position += 1
