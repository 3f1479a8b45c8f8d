"""A model on disk: a folder with config.json, model.safetensors and, beside them, its tokenizer."""

import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import subquad
from subquad.checksums import check, crc32, sums_of, write_tensors
from subquad.errors import UserError
from subquad.files import recover, write_folder
from subquad.layers.base import convert
from subquad.models.config import LMConfig, refuse_code
from subquad.models.lm import LM
from subquad.reading import read_mapping

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(model: LM, folder: str | Path, *, tokenizer: Any = None, overwrite: bool = False) -> Path:
    """Write `model` (and its tokenizer) to `folder`; it appears whole or not at all.

    An existing folder is an error unless `overwrite`, which replaces it only if it is empty or holds a model.
    """
    folder = Path(folder)
    recover(folder)
    if folder.exists():
        if not overwrite:
            raise UserError(f"{folder} exists; pass overwrite (--overwrite) to replace it")
        if not folder.is_dir() or (any(folder.iterdir()) and not _holds_model(folder)):
            raise UserError(f"{folder} exists and holds no model of subquad, so it will not be replaced")
    values = {"format": "subquad", "version": subquad.__version__, "lm": model.config.to_dict()}
    values["tokenizer"] = "bytes" if tokenizer is None else tokenizer.kind
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(model).items()}

    def fill(partial: Path) -> None:
        write_tensors(tensors, partial / WEIGHTS, {"format": "pt"})
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(partial)

    write_folder(folder, fill, replace=overwrite)
    return folder


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_code: bool = False,
) -> LM:
    """The model in `folder`, ready to run (in eval mode), with its weights in `dtype`, by default the file's.

    What its layers declare to stay float32 (decay rates, step biases) is that in every narrower dtype.
    trust_code: import the classes that its config.json names by dotted paths; else that is an error.
    """
    folder = Path(folder)
    recover(folder)
    if not folder.is_dir():
        raise UserError(f"there is no model folder {folder}")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no model of subquad: it has no {' and no '.join(missing)}")
    values = read_mapping(folder / CONFIG)
    if values.get("format") != "subquad" or not isinstance(values.get("lm"), dict):
        raise UserError(
            f"{folder / CONFIG} was not written by subquad: it has no 'format': 'subquad' with an 'lm' part"
        )
    if not trust_code:
        refuse_code(values["lm"], folder / CONFIG)
    config = LMConfig.from_dict(values["lm"])
    with torch.random.fork_rng(devices=[]), torch.device(device), _NoInit():
        model = LM(config)
        convert(model, dtype or _dtype_of(folder / WEIGHTS) or torch.get_default_dtype())  # before it is filled
    _fill(model, folder / WEIGHTS)
    return model.eval()


class _NoInit(TorchFunctionMode):
    """Leaves new weights as they are in memory, for a file to fill.

    Not the meta device: what layers compute in their constructors would there import torch's compiler, 2 CPU seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def fingerprint(model: LM) -> str:
    """A digest of the configuration and of every weight's checksum: what ties a saved state to its model.

    What the file of a loaded model said is taken for weights that torch has not seen change since; a change behind its
    back, through `.data`, goes unnoticed.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    known = _KNOWN.get(model, {})
    for name, value in sorted(_entries(model).items()):
        mark, found = known.get(name, (None, ""))
        if mark is None or mark != _mark(value):
            found = crc32(value) if _is_plain(value) else f"{zlib.crc32(_bytes(value)):08x}"
        digest.update(f"{name} {found}\n".encode())
    return digest.hexdigest()[:32]


def fingerprint_of_0_1(model: LM) -> str:
    """What version 0.1.0 wrote into its state files: a digest of every byte."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, value in sorted(_entries(model).items()):
        digest.update(name.encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[:32]


# model -> name of a weight -> (its `_mark`, its checksum), as they were when its file was read
_KNOWN: WeakKeyDictionary[LM, dict[str, tuple[object, str]]] = WeakKeyDictionary()


def _mark(value: Any) -> object:
    """Changes when torch writes into the tensor or another takes its place; None where nothing would tell."""
    if not _is_plain(value) or value.is_inference():
        return None
    return value.data_ptr(), value._version, value.dtype, value.device


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight by name, one name for tied ones."""
    entries = _entries(model)
    for name, value in entries.items():
        if not _is_plain(value):
            kind = type(value).__name__
            raise UserError(f"{name} is a quantiser's {kind}, no plain tensor; save the model before it is quantised")
    return entries


def _entries(model: nn.Module) -> dict[str, Any]:
    """The state dict without second names of tied tensors, which safetensors refuses. What a quantiser keeps there may
    be no plain tensor, or none at all."""
    kept, seen = {}, set()
    for name, value in model.state_dict().items():
        place = (value.data_ptr(), value.shape) if _is_plain(value) and value.numel() else name
        if place not in seen:
            seen.add(place)
            kept[name] = value
    return kept


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_quantized and not is_traceable_wrapper_subclass(value)


def _bytes(value: Any) -> bytes:
    if _is_plain(value):
        return value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def _holds_model(folder: Path) -> bool:
    """Whether subquad wrote this folder: other libraries call their file config.json too."""
    try:
        return read_mapping(folder / CONFIG).get("format") == "subquad"
    except UserError:
        return False


def _dtype_of(path: Path) -> torch.dtype | None:
    """The dtype of most of the file's weights: that of its largest tensor of floating-point numbers, if it has one."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            slices = [file.get_slice(name) for name in names]
            floats = [(prod(s.get_shape()), FLOATS[s.get_dtype()]) for s in slices if s.get_dtype() in FLOATS]
    except (SafetensorError, OSError):
        return None  # filling the model says what is wrong
    return max(floats, key=lambda pair: pair[0])[1] if floats else None


def _fill(model: LM, path: Path) -> None:
    """Copy the file's tensors into the model, naming the first one that does not fit or is damaged."""
    expected = _tensors(model)
    known = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            sums = sums_of(path, file)
            for name in sorted(expected):
                if name not in names:
                    raise UserError(f"{path} does not fit its config.json: tensor {name!r} is missing")
                part = file.get_slice(name)
                if part.get_dtype() not in FLOATS and expected[name].is_floating_point():
                    raise UserError(f"{path}: {name!r} is {part.get_dtype()}; weights are one of {', '.join(FLOATS)}")
                shape = tuple(part.get_shape())
                if shape != tuple(expected[name].shape):
                    wanted = tuple(expected[name].shape)
                    raise UserError(
                        f"{path} does not fit its config.json: {name!r} is {shape}, the model needs {wanted}"
                    )
            extra = sorted(names - set(expected))
            if extra:
                raise UserError(f"{path} does not fit its config.json: tensor {extra[0]!r} is not part of the model")
        with torch.no_grad():
            for name, source in _streamed(path, expected):
                check(path, name, source, sums)
                target = expected[name]
                target.copy_(source)
                if sums is not None and source.dtype == target.dtype:
                    known[name] = _mark(target), sums[name]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {' '.join(str(error).split())}") from error
    _KNOWN[model] = known


def _streamed(path: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The file's tensors by name, of which few are in memory at a time.

    The pages of a mapped file stay in this process's memory until it is closed: so it is opened anew after every 32
    MiB, or loading a float32 file into bfloat16 would take three times the model.
    """
    left = list(names)
    while left:
        read = 0
        with safe_open(path, framework="pt") as file:
            while left and read < 2**25:
                name = left.pop()
                tensor = file.get_tensor(name)
                read += tensor.nbytes
                yield name, tensor
                del tensor
