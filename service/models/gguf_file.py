"""The tensors of a GGUF file, from its header.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, two counts,
key-value pairs, tensor descriptions, then the data. Files without the first bytes or shorter than
their descriptions say are refused here, with their name; the libraries that read them later say
neither.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.errors import ModelUnavailable
from service.models.headers import AGAIN
from service.models.headers import TensorInfo
from service.models.headers import unreadable

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
MOST_ITEMS = 10_000_000


class _Reader:
    """A position in the mapped file. Raises struct.error past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def count(self) -> int:
        value: int = self.number("Q")
        if value > MOST_ITEMS:
            raise ValueError(f"a count of {value:,}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        end = self.position + length
        if end > len(self.data):
            raise struct.error("past the end")
        text = self.data[self.position : end]
        self.position = end
        return text.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A scalar or a string; arrays are walked over and given back as None."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        item, count = self.number("I"), self.count()
        if item in SCALARS:
            self.position += count * struct.calcsize(f"<{SCALARS[item]}")
            return None
        for _ in range(count):
            self.value(item)
        return None


def read(path: Path) -> Mapping[str, TensorInfo]:
    """The tensors of one GGUF file by GGUF name ("blk.0.attn_q.weight"); dtype is ggml's ("Q4_1").

    Shapes are in torch's order. Raises ModelUnavailable naming the file.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelUnavailable(
                    f"{path}: not a GGUF file",
                    hint="a git-lfs pointer or an HTML page may have been saved in its place; "
                    "download it again",
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _tensors(path, _Reader(data))
    except OSError as error:
        raise unreadable(str(path), error) from None
    except struct.error:
        raise ModelUnavailable(f"{path}: truncated in its header", hint=AGAIN) from None
    except (KeyError, ValueError, RecursionError) as error:
        raise ModelUnavailable(f"{path}: malformed header ({error})", hint=AGAIN) from None


def _tensors(path: Path, reader: _Reader) -> Mapping[str, TensorInfo]:
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.constants import GGMLQuantizationType

    reader.position = 4
    version = reader.number("I")
    if version not in (2, 3):
        raise ModelUnavailable(
            f"{path}: GGUF version {version}; versions 2 and 3 can be read",
            hint="convert the model again with a current llama.cpp",
        )
    tensors, pairs = reader.count(), reader.count()
    alignment = 32
    for _ in range(pairs):
        key = reader.string()
        value = reader.value(reader.number("I"))
        if key == "general.alignment" and isinstance(value, int) and value > 0:
            alignment = value
    found: dict[str, TensorInfo] = {}
    ends = [0]
    for _ in range(tensors):
        name = reader.string()
        shape = tuple(reader.number("Q") for _ in range(min(reader.number("I"), 8)))
        kind = GGMLQuantizationType(reader.number("I"))
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes
        ends.append(reader.number("Q") + size)
        found[name] = TensorInfo(path.name, kind.name, shape[::-1], size)
    start = -(-reader.position // alignment) * alignment
    if start + max(ends) > len(reader.data):
        raise ModelUnavailable(
            f"{path}: truncated, {len(reader.data):,} bytes of {start + max(ends):,}", hint=AGAIN
        )
    return found
