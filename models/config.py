"""A model's configuration: a mapping, checked word by word before anything is built."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from subquad.errors import UserError, shown, shown_text
from subquad.layers.build import Spec, check_keys, check_range, check_type, without_infinities
from subquad.reading import read_mapping

MOST_BLOCKS = 512
WIDEST = 2**20


@dataclass
class LMConfig:
    """What an LM is made of.

    d_model: width D of the residual stream.
    blocks: a list of stages {repeat: n, pattern: [block, ...]}; a block is {mixer: {name: ..., **arguments}, ffn:
        {...}}, either of which may be left out, and with parallel: true both read the same input (Wang and Komatsuzaki
        2021). A name is a class of subquad.layers or a dotted path to anyone's class.
    vocab_size: V; 256 for bytes.
    tie_embeddings: the head uses the embedding's weights.
    norm: "rms" or "layer", of the residual stream; norm_eps: its epsilon.
    embedding_norm: one more norm behind the embedding (RWKV).
    logit_softcap: c of c tanh(logits / c), None for none (Gemma, xLSTM).
    init_std: standard deviation of the initial weights; by default sqrt(2 / (5 D)) (Nguyen and Salazar 2019).
    """

    d_model: int
    blocks: list[dict[str, Any]] = field(default_factory=list)
    vocab_size: int = 256
    tie_embeddings: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    embedding_norm: bool = False
    logit_softcap: float | None = None
    init_std: float | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(LMConfig)
        for f in fields(self):
            check_type(f.name, getattr(self, f.name), hints[f.name])
        check_range("d_model", self.d_model, 1, WIDEST)
        check_range("vocab_size", self.vocab_size, 1)
        for name in ("norm_eps", "init_std", "logit_softcap"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
        self.blocks = without_infinities(self.blocks)
        if not self.blocks:
            raise UserError("blocks is empty; give at least one stage, such as blocks: [{pattern: [{mixer: Mamba2}]}]")
        for i, stage in enumerate(self.blocks):
            _check_stage(f"blocks[{i}]", stage)
        count = sum(stage.get("repeat", 1) * len(stage["pattern"]) for stage in self.blocks)
        if count > MOST_BLOCKS:
            raise UserError(f"blocks and their repeats make {count:,} blocks; a model has at most {MOST_BLOCKS:,}")

    @classmethod
    def from_dict(cls, values: Spec) -> "LMConfig":
        """From a mapping of these fields, or a training configuration that holds one under model.lm."""
        if isinstance(values.get("model"), Mapping):
            values = values["model"].get("lm", {})
            if not isinstance(values, Mapping):
                raise UserError(f"model.lm is {shown(values)}; it must be a mapping of d_model, blocks and others")
        known = [f.name for f in fields(cls)]
        check_keys("", values, known)
        if "d_model" not in values:
            raise UserError("the configuration has no d_model; a model needs at least d_model and blocks")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> "LMConfig":
        """From a YAML or JSON file."""
        return cls.from_dict(read_mapping(path))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def flat_blocks(self) -> list[tuple[str, dict[str, Any]]]:
        """(path, block) of every block in order, repeats written out."""
        return [
            (f"blocks[{i}].pattern[{j}]", block)
            for i, stage in enumerate(self.blocks)
            for _ in range(stage.get("repeat", 1))
            for j, block in enumerate(stage["pattern"])
        ]


def refuse_code(values: Any, source: str | Path, how: str = "pass trust_code (--trust-code) if you trust it") -> None:
    """One sentence where `values`, which nobody named but which lie in `source`, would import a class and so run code.

    A name with a dot is one; no other word of a model's configuration has a dot.
    """
    level = [values]
    while level:
        for name in level:
            if isinstance(name, str) and "." in name:
                raise UserError(
                    f"{shown_text(str(source))} names the class {shown(name)}, which would be imported and run; {how}"
                )
        level = [
            item
            for v in level
            if isinstance(v, Mapping | list)
            for item in (v.values() if isinstance(v, Mapping) else v)
        ]


def _check_stage(where: str, stage: Any) -> None:
    if not isinstance(stage, Mapping):
        raise UserError(f"{where} is {shown(stage)}; a stage is a mapping {{repeat: n, pattern: [...]}}")
    check_keys(where, stage, ["repeat", "pattern"])
    check_type(f"{where}.repeat", stage.get("repeat", 1), int)
    check_range(f"{where}.repeat", stage.get("repeat", 1), 1, MOST_BLOCKS)
    pattern = stage.get("pattern")
    if not isinstance(pattern, list) or not pattern:
        raise UserError(f"{where}.pattern is {shown(pattern)}; it must be a list of blocks such as [{{mixer: Mamba2}}]")
    for j, block in enumerate(pattern):
        here = f"{where}.pattern[{j}]"
        if not isinstance(block, Mapping) or not block:
            raise UserError(
                f"{here} is {shown(block)}; a block is a mapping {{mixer: ..., ffn: ...}} with at least one of them"
            )
        check_keys(here, block, ["mixer", "ffn", "parallel"])
        check_type(f"{here}.parallel", block.get("parallel", False), bool)
        for part, spec in block.items():
            if part != "parallel" and spec is not None and not isinstance(spec, str | Mapping):
                raise UserError(f"{here}.{part} is {shown(spec)}; give a layer's name or a mapping {{name: ..., ...}}")
