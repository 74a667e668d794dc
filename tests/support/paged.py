"""Sequences kept in pages, with everything that must not be read poisoned, and naive attention."""

import random
from dataclasses import dataclass

import torch

# An entry of a page table behind which nothing visible lies: reading it faults or is NaN.
NO_PAGE = 2**30


@dataclass(frozen=True)
class Shape:
    """Heads of one layer and what its attention does."""

    heads: int = 4
    kv_heads: int = 2
    key: int = 16
    value: int = 16
    page: int = 8
    window: int | None = None
    ring: bool = False
    softcap: float | None = None

    @property
    def scale(self) -> float:
        return self.key**-0.5

    @property
    def options(self) -> dict[str, float | int | None]:
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}


@dataclass(frozen=True)
class Kept:
    """What a layer keeps of some sequences, whose last `new[i]` tokens are this step's."""

    shape: Shape
    key_pages: torch.Tensor
    value_pages: torch.Tensor
    tables: torch.Tensor  # int32 [n, width]
    lengths: list[int]
    new: list[int]
    query: torch.Tensor  # [sum of new, heads, key], a view with other strides
    key: list[torch.Tensor]  # of each sequence, all tokens: [length, kv heads, key]
    value: list[torch.Tensor]
    slots: torch.Tensor  # int64 [sum of new]

    @property
    def starts(self) -> list[int]:
        return [sum(self.new[:i]) for i in range(len(self.new) + 1)]

    @property
    def counts(self) -> torch.Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.query.device)

    @property
    def new_key(self) -> torch.Tensor:
        """This step's keys [sum of new, kv heads, key], strided as a model hands them over."""
        return strided(
            torch.cat([k[len(k) - n :] for k, n in zip(self.key, self.new, strict=True)])
        )

    @property
    def new_value(self) -> torch.Tensor:
        new = zip(self.value, self.new, strict=True)
        return strided(torch.cat([v[len(v) - n :] for v, n in new]))


def fresh_seed() -> int:
    """A new seed each time, printed so that a failure can be repeated."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return seed


def strided(rows: torch.Tensor) -> torch.Tensor:
    """The same [T, heads, size], as the transposed view of [1, heads, T, size] that models give."""
    return rows.transpose(0, 1).contiguous()[None][0].transpose(0, 1)


def keep(
    shape: Shape,
    lengths: list[int],
    new: list[int] | None = None,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    spare_width: int = 2,
) -> Kept:
    """Random sequences in pages of random order; what no query may see is NaN.

    This step's tokens are in the pages too. A sequence of length 0 has a new token all the same,
    a row of a bucket that nobody uses.
    """
    new = [1] * len(lengths) if new is None else new
    source = torch.Generator().manual_seed(seed)

    def numbers(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=source).to(dtype)

    page = shape.page
    needed = [-(-length // page) for length in lengths]
    if shape.ring:
        assert shape.window is not None
        around = [-(-(shape.window + n) // page) + 1 for n in new]
        needed = [min(*both) for both in zip(needed, around, strict=True)]
    count = sum(needed) + 3
    order = torch.randperm(count, generator=source).tolist()
    width = max(1, *(-(-length // page) for length in lengths)) + spare_width
    tables = torch.full((len(lengths), width), NO_PAGE, dtype=torch.int32)
    key_pages = torch.full((count, page, shape.kv_heads, shape.key), torch.nan, dtype=dtype)
    value_pages = torch.full((count, page, shape.kv_heads, shape.value), torch.nan, dtype=dtype)
    keys, values, slots = [], [], []
    for row, length in enumerate(lengths):
        mine = [order.pop() for _ in range(needed[row])]
        key, value = (numbers(length, shape.kv_heads, size) for size in (shape.key, shape.value))
        first = length - new[row]
        oldest = 0 if shape.window is None else max(0, first - shape.window + 1)
        for position in range(oldest, length):
            at = mine[position // page % len(mine)]
            tables[row, position // page] = at
            key_pages[at, position % page] = key[position]
            value_pages[at, position % page] = value[position]
            if position >= first:
                slots.append(at * page + position % page)
        keys.append(key.to(device))
        values.append(value.to(device))
    return Kept(
        shape,
        key_pages.to(device),
        value_pages.to(device),
        tables.to(device),
        lengths,
        new,
        strided(numbers(sum(new), shape.heads, shape.key)).to(device),
        keys,
        values,
        torch.tensor(slots, dtype=torch.int64, device=device),
    )


def naive(kept: Kept) -> torch.Tensor:
    """Attention of every new token, one at a time in float64: [sum of new, heads, value size]."""
    shape = kept.shape
    group = shape.heads // shape.kv_heads
    out = []
    for row, length in enumerate(kept.lengths):
        for offset in range(kept.new[row]):
            position = length - kept.new[row] + offset
            if position < 0:
                out.append(kept.query.new_zeros(shape.heads, shape.value, dtype=torch.float64))
                continue
            oldest = 0 if shape.window is None else max(0, position - shape.window + 1)
            key = kept.key[row][oldest : position + 1].double().repeat_interleave(group, 1)
            value = kept.value[row][oldest : position + 1].double().repeat_interleave(group, 1)
            query = kept.query[kept.starts[row] + offset].double()
            scores = torch.einsum("hd,khd->hk", query, key) * shape.scale
            if shape.softcap is not None:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value))
    return torch.stack(out)


def error(result: torch.Tensor, right: torch.Tensor) -> float:
    """The largest relative error of any query's result; NaN stays NaN and passes no bound."""
    assert result.shape == right.shape
    wrong = (result.double() - right).norm(dim=(1, 2))
    return float((wrong / right.norm(dim=(1, 2)).clamp_min(1e-9)).max())


SHAPES = {
    "grouped": Shape(heads=6, kv_heads=2),
    "one key per query head": Shape(heads=3, kv_heads=3),
    "one key for all": Shape(heads=5, kv_heads=1),
    "group wider than a tile": Shape(heads=71, kv_heads=1, key=16),
    "window": Shape(window=11),
    "window of one": Shape(window=1),
    "window longer than all": Shape(window=500),
    "ring": Shape(window=11, ring=True),
    "ring of whole pages": Shape(window=16, ring=True),
    "soft cap": Shape(softcap=3.0),
    "soft cap in a ring": Shape(softcap=3.0, window=9, ring=True),
    "values shorter than keys": Shape(key=24, value=16),
    "values longer than keys": Shape(key=16, value=24),
    "odd head": Shape(key=20, value=20),
}
