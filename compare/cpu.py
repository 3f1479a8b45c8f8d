"""`subquad compare cpu`: speed on a CPU against transformers, same shapes, random weights, in one run.

Prefill: one sequence through the model with a state (a cache) and the logits of its last token. Decode: single tokens
from there, each through the model's own forward. Speeds are tokens per second of CPU time, so they stand on a machine
that is shared; the two libraries take turns and the best of the repeats counts.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import process_time
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from subquad.arguments import Parser
from subquad.compare.output import csv_writer, json_writer, typed
from subquad.compare.results import begin
from subquad.errors import UserError, nearest
from subquad.files import check_output, write_atomically
from subquad.models.lm import LM

VOCAB, WINDOW, HEAD = 256, 512, 64
LIBRARIES = ("ours", "transformers")
Row = dict[str, Any]


class Pair(NamedTuple):
    """One architecture: our pattern of blocks, transformers' configuration class with its arguments, and what else our
    model's configuration says."""

    pattern: list[dict[str, Any]]
    config: str
    arguments: dict[str, Any]
    fields: Mapping[str, Any] = MappingProxyType({})


def pairs(d: int, layers: int) -> dict[str, Pair]:
    """The architectures by name, at width d."""
    n_heads = d // HEAD
    groups, d_ff = max(1, n_heads // 2), -(-8 * d // 3 // 8) * 8
    attention = {"name": "Attention", "n_heads": n_heads, "n_kv_heads": groups}
    windowed, ffn = {**attention, "window": WINDOW}, {"name": "SwiGLU", "d_ff": d_ff}
    experts = {"name": "MoE", "n_experts": 8, "top_k": 2, "d_ff": d_ff}
    latent_widths = {
        "qk_nope_head_dim": HEAD,
        "qk_rope_head_dim": HEAD // 2,
        "v_head_dim": HEAD,
        "kv_lora_rank": d // 2,
    }
    latent = {"name": "LatentAttention", "n_heads": n_heads, "rope_theta": None, **latent_widths}
    gated_attention = {**attention, "rope_fraction": 0.25, "qk_norm": True, "output_gate": True}
    griffin_attention = {**windowed, "n_kv_heads": 1, "rope_fraction": 0.5, "out_bias": True}
    heads = {
        "num_attention_heads": n_heads,
        "num_key_value_heads": groups,
        "head_dim": HEAD,
        "intermediate_size": d_ff,
    }
    linear_heads = {
        "linear_num_key_heads": n_heads,
        "linear_num_value_heads": n_heads,
        "linear_key_head_dim": HEAD,
        "linear_value_head_dim": HEAD,
    }
    kimi_heads = {
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads,
        "linear_num_heads": n_heads,
        "linear_head_dim": HEAD,
        **latent_widths,
    }
    recurrent_gemma = {
        "num_attention_heads": n_heads,
        "num_key_value_heads": 1,
        "attention_window_size": WINDOW,
        "intermediate_size": 2 * d_ff,  # of both products together
    }
    mixtral = {**heads, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
    ssd = {"num_heads": 2 * d // HEAD, "head_dim": HEAD, "state_size": 128, "n_groups": 1}
    # Three layers of the one kind, then one of attention; the last layer is attention whatever their number.
    kinds = ["full_attention" if i % 4 == 3 or i == layers - 1 else "linear_attention" for i in range(layers)]

    def mixed(linear: dict[str, Any], full: dict[str, Any], ffn: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"mixer": full if kind == "full_attention" else linear, "ffn": ffn} for kind in kinds]

    return {
        "mamba": Pair([{"mixer": "Mamba"}] * layers, "MambaConfig", {}),
        "mamba2": Pair([{"mixer": {"name": "Mamba2", "head_dim": HEAD}}] * layers, "Mamba2Config", ssd),
        "rwkv": Pair(
            [{"mixer": "RWKV4", "ffn": {"name": "RWKVChannelMix", "expand": 4}}] * layers,
            "RwkvConfig",
            {},
            {"norm": "layer", "embedding_norm": True},
        ),
        "recurrent-gemma": Pair(
            mixed({"name": "RGLRU", "n_heads": n_heads}, griffin_attention, {**ffn, "bias": True}),
            "RecurrentGemmaConfig",
            {
                **recurrent_gemma,
                "block_types": ["attention" if kind == "full_attention" else "recurrent" for kind in kinds],
            },
            {"logit_softcap": 30.0},
        ),
        "minimax": Pair(
            [{"mixer": {"name": "LightningAttention", "n_heads": n_heads}, "ffn": experts}] * layers,
            "MiniMaxConfig",
            {**mixtral, "layer_types": ["linear_attention"] * layers},
        ),
        "gated-deltanet": Pair(
            mixed({"name": "GatedDeltaNet", "n_heads": n_heads, "head_dim": HEAD}, gated_attention, ffn),
            "Qwen3NextConfig",
            {**heads, **linear_heads, "num_experts": 0, "layer_types": kinds},
        ),
        "kda": Pair(
            mixed({"name": "KimiDeltaAttention", "n_heads": n_heads, "head_dim": HEAD}, latent, ffn),
            "KimiLinearConfig",
            {**kimi_heads, "intermediate_size": d_ff, "layer_types": kinds, "mlp_layer_types": ["dense"] * layers},
        ),
        "mistral": Pair(
            [{"mixer": windowed, "ffn": ffn}] * layers, "MistralConfig", {**heads, "sliding_window": WINDOW}
        ),
        "mixtral": Pair([{"mixer": attention, "ffn": experts}] * layers, "MixtralConfig", mixtral),
    }


class Ours:
    """Our model, one token or many at a time."""

    def __init__(self, pair: Pair, d: int):
        stage = {"pattern": pair.pattern}
        values = {"d_model": d, "vocab_size": VOCAB, "tie_embeddings": False, "blocks": [stage], **pair.fields}
        self.model: nn.Module = LM.from_config(values).eval()

    def begin(self, max_len: int) -> None:
        self.state = self.model.init_state(1, max_len)

    def step(self, tokens: Tensor) -> Tensor:
        logits, self.state = self.model(tokens, self.state, logits="last")
        return logits


@contextmanager
def torch_only() -> Iterator[None]:
    """Models of transformers first built inside take its torch code, not a kernel package's (fla's needs a GPU)."""
    os.environ["USE_HUB_KERNELS"] = "NO"  # nothing downloaded either
    packages = ("causal_conv1d", "fla", "mamba_ssm")
    held = {name: sys.modules.pop(name) for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]  # None: an import of it fails
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(held)


class Theirs:
    """transformers' model with its cache."""

    def __init__(self, pair: Pair, d: int):
        import transformers

        transformers.logging.set_verbosity_error()
        sizes = {"hidden_size": d, "num_hidden_layers": len(pair.pattern), "vocab_size": VOCAB}
        plain = {"tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        config = getattr(transformers, pair.config)(**sizes, **plain, **pair.arguments)
        with torch_only():
            self.model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
        names = {"mamba": "cache_params", "mamba2": "cache_params", "rwkv": "state"}
        self.cache_name = names.get(config.model_type, "past_key_values")
        self.keeps_cache = config.model_type == "recurrent_gemma"  # it does not hand back the cache it makes

    def begin(self, max_len: int) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config) if self.keeps_cache else None

    def step(self, tokens: Tensor) -> Tensor:
        out = self.model(tokens, use_cache=True, logits_to_keep=1, **{self.cache_name: self.cache})
        self.cache = self.cache if self.keeps_cache else getattr(out, self.cache_name)
        return out.logits


def measure(model: Ours | Theirs, prompt: Tensor, following: Sequence[Tensor]) -> tuple[float, float]:
    """CPU seconds of the prefill and of the tokens after it."""
    model.begin(prompt.shape[1] + len(following))
    start = process_time()
    model.step(prompt)
    middle = process_time()
    for token in following:
        model.step(token)
    return middle - start, process_time() - middle


@torch.inference_mode()
def compare(pair: Pair, d: int, tokens: int, new_tokens: int, repeat: int) -> Iterator[Row]:
    """One architecture's row after each repeat, with the best so far."""
    torch.manual_seed(0)
    models = {"ours": Ours(pair, d), "transformers": Theirs(pair, d)}
    prompt = torch.randint(VOCAB, (1, tokens))
    following = torch.randint(VOCAB, (1, new_tokens)).split(1, 1)
    for model in models.values():  # first calls allocate and choose code paths
        measure(model, prompt[:, : min(tokens, 128)], following[:4])
    best = {library: (float("inf"), float("inf")) for library in LIBRARIES}
    for i in range(repeat):
        for library in LIBRARIES if i % 2 == 0 else reversed(LIBRARIES):
            times = measure(models[library], prompt, following)
            best[library] = tuple(map(min, best[library], times))
        row: Row = {f"parameters, {library}": _parameters(models[library].model) for library in LIBRARIES}
        for j, (phase, count) in enumerate((("prefill", tokens), ("decode", new_tokens))):
            speed = {library: count / best[library][j] for library in LIBRARIES}
            row |= {f"{phase} tokens/s, {library}": round(speed[library], 1) for library in LIBRARIES}
            row[f"{phase} ratio"] = round(speed["ours"] / speed["transformers"], 3)
        yield row


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the files asked for."""
    parser = Parser(prog="subquad compare cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="names separated by commas; by default all: " + ", ".join(pairs(HEAD, 1)))
    parser.add_argument("--tokens", type=int, default=2048, help="length of the prefill (2048)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens decoded after it (64)")
    parser.add_argument("--d-model", type=int, default=256, help=f"width, a multiple of {HEAD} (256)")
    parser.add_argument("--layers", type=int, default=4, help="blocks (4)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (1)")
    parser.add_argument("--repeat", type=int, default=5, help="the best of this many runs counts (5)")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--json", type=Path, help="write the rows here, with command, machine, versions and settings")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    given = parser.parse_args(argv)
    for name in ("tokens", "new_tokens", "d_model", "threads", "repeat"):
        parser.at_least(given, name, 1)
    parser.at_least(given, "layers", 2)  # gated-deltanet ends in one layer of attention
    if given.d_model % HEAD:
        raise UserError(f"--d-model is {given.d_model}; it must be a multiple of the head width {HEAD}")
    known = pairs(given.d_model, given.layers)
    names = list(known) if given.models is None else given.models.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--models: there is no {name!r} to compare; {nearest(name, known)}")
    for path in filter(None, (given.csv, given.json)):
        check_output(path, overwrite=given.overwrite)
    torch.set_num_threads(given.threads)

    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(names) * given.repeat)
        for name in names:
            progress.update(task, description=name)
            for row in compare(known[name], given.d_model, given.tokens, given.new_tokens, given.repeat):  # noqa: B007
                progress.advance(task)
            rows.append({"model": name, **row})
    names_of_settings = ("tokens", "new_tokens", "d_model", "layers", "threads", "repeat")
    about = begin(
        typed("compare cpu", argv), torch.device("cpu"), {name: getattr(given, name) for name in names_of_settings}
    )
    about.versions["transformers"] = version("transformers")
    Console().print(_table(rows, about.settings | about.versions))
    if given.csv:
        write_atomically(given.csv, csv_writer(rows), overwrite=given.overwrite)
    if given.json:
        write_atomically(given.json, json_writer(about, rows), overwrite=given.overwrite)
    return 0


def _table(rows: list[Row], setting: dict[str, Any]) -> Table:
    lines = [
        "Tokens per CPU second, best of {repeat} (torch {torch}, transformers {transformers})",
        "prefill {tokens}, decode {new_tokens}, width {d_model}, {layers} layers, batch 1, threads: {threads}",
    ]
    table = Table(title="\n".join(lines).format(**setting), title_justify="left")
    table.add_column("model", no_wrap=True)
    for phase in ("prefill", "decode"):
        for heading in (f"{phase}\nours", f"{phase}\ntransf.", "ratio"):
            table.add_column(heading, justify="right")
    for row in rows:
        cells = []
        for phase in ("prefill", "decode"):
            cells += [f"{row[f'{phase} tokens/s, {library}']:,.0f}" for library in LIBRARIES]
            cells.append(f"{row[f'{phase} ratio']:.2f}x")
        table.add_row(row["model"], *cells)
    return table
