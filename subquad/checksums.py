"""A checksum for every tensor of a safetensors file, kept in its metadata, and one for the rest of the header.

A flipped bit anywhere in a file that subquad wrote is an error of one sentence that names the tensor. Files of others
have no checksums and are read without. CRC-32 is zlib's, which takes 1 s for 1 to 3 GB.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from subquad.errors import UserError

SUMS, HEADER = "crc32", "header_crc32"  # keys of the metadata
PIECE = 2**26  # values looked at at once, so that a GPU's tensor takes no second copy in memory


def crc32(tensor: Tensor) -> str:
    """CRC-32 of a tensor's values in memory order, as eight hexadecimal digits."""
    found, flat = 0, tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE].cpu().contiguous().view(torch.uint8)
        found = zlib.crc32(piece.numpy(), found)
    return f"{found:08x}"


def write_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """A safetensors file with the metadata `about` and the checksums. The same content gives the same bytes."""
    save_file(dict(tensors), path, metadata=sealed(tensors, about))
    with open(path, "r+b") as file:  # the library writes metadata in no certain order
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))


def sealed(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> dict[str, str]:
    """The metadata `about` with the checksums of `tensors`."""
    sums = {name: crc32(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise UserError(f"tensor {name!r} is {tensor.dtype}, which is not written to files")
    header = {name: (_NAMES[t.dtype], list(t.shape)) for name, t in tensors.items()}
    about = {**about, SUMS: json.dumps(sums, sort_keys=True)}
    return {**about, HEADER: _header(about, header)}


def sums_of(path: object, file: Any) -> dict[str, str] | None:
    """The checksums in an open safetensors file; None where it was written without.

    Raises UserError where names, types, shapes or metadata are not those that were written.
    """
    about = dict(file.metadata() or {})
    if SUMS not in about and HEADER not in about:
        return None
    expected = about.pop(HEADER, None)
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # a handle, no mapping
    header = {name: (s.get_dtype(), list(s.get_shape())) for name, s in slices.items()}
    if expected != _header(about, header):
        raise UserError(f"{path} is damaged: its header is not the one that was written")
    return json.loads(about[SUMS])


def check(path: object, name: str, tensor: Tensor, sums: Mapping[str, str] | None) -> Tensor:
    """The tensor, if it is the one that was written."""
    if sums is not None and crc32(tensor) != sums.get(name):
        raise UserError(f"{path} is damaged: tensor {name!r} is not the one that was written")
    return tensor


def _header(about: Mapping[str, str], tensors: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps([dict(about), dict(tensors)], sort_keys=True).encode()):08x}"


_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
