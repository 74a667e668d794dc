"""The header of a safetensors file, read and checked without its tensors.

The safetensors library's own errors lack the file's name, and `from_pretrained` notices a damaged
file only after it has read the ones before it. Layout: 8 bytes little-endian length, that many
bytes of JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the data
(https://huggingface.co/docs/safetensors/index#format).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import ModelUnavailable

LARGEST_HEADER_BYTES = 100_000_000
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
AGAIN = "download or copy the file again; it was cut short or damaged on the way"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: file, safetensors dtype ("BF16"), shape, bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def read(path: Path, name: str | None = None) -> Mapping[str, TensorInfo]:
    """The tensors of one safetensors file, checked against the file's size.

    `name` is what `TensorInfo.file` and messages say; default: the file's name. Raises
    ModelUnavailable naming the file when it is unreadable, truncated, longer than its header says,
    or its header is malformed.
    """
    label = name or path.name
    header, data_bytes = _header(path, label)
    tensors = {
        key: _tensor(label, key, value, data_bytes)
        for key, value in header.items()
        if key != "__metadata__"
    }
    _check_layout(label, header, data_bytes)
    return tensors


def _header(path: Path, label: str) -> tuple[dict[str, Any], int]:
    """The parsed header and the number of data bytes that follow it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or (length <= LARGEST_HEADER_BYTES and 8 + length > size):
                raise ModelUnavailable(f"{label}: truncated, {size:,} bytes", hint=AGAIN)
            if not 2 <= length <= LARGEST_HEADER_BYTES:
                raise ModelUnavailable(
                    f"{label}: not a safetensors file (header of {length:,} bytes)",
                    hint="a git-lfs pointer or an HTML page may have been saved in its place; "
                    "download it again",
                )
            text = file.read(length)
    except OSError as error:
        raise unreadable(label, error) from None
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelUnavailable(f"{label}: unreadable header ({error})", hint=AGAIN) from None
    if not isinstance(header, dict):
        raise ModelUnavailable(f"{label}: the header is not a JSON object", hint=AGAIN)
    return header, size - 8 - length


def unreadable(label: str, error: OSError) -> ModelUnavailable:
    """The error for a file that the operating system would not give us."""
    return ModelUnavailable(
        f"{label}: cannot be read: {error.strerror or error}",
        hint="check that the file exists and that this user may read it",
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor(label: str, key: str, value: Any, data_bytes: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, begin, end)
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or begin > end:
        raise ModelUnavailable(f"{label}: tensor {key} has a malformed entry", hint=AGAIN)
    if end > data_bytes:
        raise ModelUnavailable(
            f"{label}: truncated, tensor {key} ends at byte {end:,} of {data_bytes:,} data bytes",
            hint=AGAIN,
        )
    bits = BITS.get(dtype)
    if bits is not None and end - begin != math.prod(shape) * bits // 8:
        raise ModelUnavailable(
            f"{label}: tensor {key} is {end - begin:,} bytes, not what {dtype} {list(shape)} needs",
            hint=AGAIN,
        )
    return TensorInfo(label, dtype, shape, end - begin)


def _check_layout(label: str, header: Mapping[str, Any], data_bytes: int) -> None:
    """Tensors lie side by side and fill the file: no hole, no overlap, no rest."""
    spans = sorted(v["data_offsets"] for k, v in header.items() if k != "__metadata__")
    position = 0
    for begin, end in spans:
        if begin != position:
            raise ModelUnavailable(f"{label}: tensors overlap or leave a gap", hint=AGAIN)
        position = end
    if position != data_bytes:
        raise ModelUnavailable(
            f"{label}: {data_bytes - position:,} bytes after the last tensor", hint=AGAIN
        )
