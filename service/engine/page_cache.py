"""Keys and values in pages, and a step over them. The tensors behind `pages.Pages`.

Every layer has its pages on the device where it runs, so a model that is spread over devices has
its cache spread alike. Layers that keep the same tokens form a group with one set of page tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from service.engine import attention_pages
from service.engine.attention import Layer
from service.engine.pages import Group
from service.engine.pages import PageHold
from service.engine.scheduler import Batch
from service.engine.scheduler import Piece
from service.placement import kv
from service.placement.inputs import send
from service.placement.tensors import only_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Budget:
    """How much is kept. kv_tokens: in all; context: of one sequence, at most `sequences` at once.

    step_tokens: most that one step computes.
    """

    kv_tokens: int
    context: int
    sequences: int
    step_tokens: int


class PageCache:
    """The tensors. Engine thread only.

    groups: for `Pages`. group_of: layer -> index of its group.
    """

    def __init__(self, layers: Mapping[int, Layer], budget: Budget) -> None:
        self.layers = layers
        kept = {index: _kept(layer, budget) for index, layer in layers.items()}
        order = sorted(set(kept.values()), key=lambda its: (-its[0], its[1] or 0))
        self.groups = tuple(_group(tokens, budget) for tokens in order)
        self.group_of = {index: order.index(tokens) for index, tokens in kept.items()}
        self.width = kv.pages(budget.context)
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        for index, layer in layers.items():
            # the last page is for padding: rows of a batch that belong to nobody write there
            shape = (self.groups[self.group_of[index]].pages + 1, kv.PAGE_TOKENS, layer.heads)
            self.keys[index] = _pages((*shape, layer.key_size), layer)
            self.values[index] = _pages((*shape, layer.value_size), layer)

    @property
    def bytes(self) -> dict[str, int]:
        """Allocated, by device."""
        found: dict[str, int] = {}
        for tensor in (*self.keys.values(), *self.values.values()):
            device = str(tensor.device)
            found[device] = found.get(device, 0) + tensor.numel() * tensor.itemsize
        return found

    def write(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Keep keys and values of a step in the pages of a layer; see `attention_pages.write`."""
        kernels_for(key.device).write(key, value, self.keys[layer], self.values[layer], slots)

    def decode(
        self,
        layer: int,
        query: torch.Tensor,
        tables: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attention of one new token per sequence; see `attention_pages.decode`."""
        shape = self.layers[layer]
        attended: torch.Tensor = kernels_for(query.device).decode(
            query,
            self.keys[layer],
            self.values[layer],
            tables,
            lengths,
            scale=scale,
            window=shape.window,
            softcap=shape.softcap,
        )
        return attended

    def order(self, batch: Batch) -> tuple[Piece, ...]:
        """As they come: pages lie anywhere."""
        return batch.decodes

    def step(self, decodes: tuple[Piece, ...], prefills: tuple[Piece, ...]) -> "PageStep":
        return PageStep(self, decodes, prefills)


@dataclass(frozen=True)
class Tables:
    """What layers of one group on one device have in common in one step, on that device.

    slots int64 [T]: where each token is kept. tables int32 [sequences, pages], lengths int32: of
    the decodes; piece_tables of the prefills. plan: what `attention_cuda.prefill` gathers.
    """

    slots: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    piece_tables: torch.Tensor
    plan: object


class PageStep:
    """One step over a PageCache."""

    def __init__(
        self, cache: PageCache, decodes: tuple[Piece, ...], prefills: tuple[Piece, ...]
    ) -> None:
        self._cache = cache
        self.decodes = decodes
        self.prefills = prefills
        self._starts = [0]
        for piece in prefills:
            self._starts.append(self._starts[-1] + len(piece.ids))
        self._ends = [piece.stop for piece in prefills]
        self._tables: dict[tuple[torch.device, int, int | None], Tables] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        tables = self.tables(layer)
        self._cache.write(layer, key, value, tables.slots)
        count = len(self.decodes)
        outs: list[torch.Tensor] = []
        if count:
            outs.append(
                self._cache.decode(layer, query[:count], tables.tables, tables.lengths, scale)
            )
        if self.prefills:
            outs.append(self.attend_prefills(layer, query[count:], scale))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def attend_prefills(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        """Of the pieces of prompts alone; their keys and values are in the pages.

        query [their tokens, heads, key size]. Returns [their tokens, heads, value size].
        """
        shape, tables = self._cache.layers[layer], self.tables(layer)
        plan = {} if tables.plan is None else {"plan": tables.plan}
        attended: torch.Tensor = kernels_for(query.device).prefill(
            query,
            self._cache.keys[layer],
            self._cache.values[layer],
            tables.piece_tables,
            self._starts,
            self._ends,
            scale=scale,
            window=shape.window,
            softcap=shape.softcap,
            **plan,
        )
        return attended

    def tables(self, layer: int) -> Tables:
        """Made once for all layers of a group on a device that see as far."""
        shape, group = self._cache.layers[layer], self._cache.group_of[layer]
        found = self._tables.get((shape.device, group, shape.window))
        if found is None:
            found = self._make(shape.device, group, shape.window)
            self._tables[shape.device, group, shape.window] = found
        return found

    def _make(self, device: torch.device, group: int, window: int | None) -> Tables:
        slots: list[int] = []
        for piece in (*self.decodes, *self.prefills):
            table = table_of(piece, group)
            slots += [
                table[at // kv.PAGE_TOKENS] * kv.PAGE_TOKENS + at % kv.PAGE_TOKENS
                for at in range(piece.start, piece.stop)
            ]
        piece_tables = _padded([table_of(piece, group) for piece in self.prefills], device)
        plan: object = None
        if self.prefills and device.type == "cuda":
            plan = kernels_for(device).plan_prefill(
                piece_tables, self._starts, self._ends, page_size=kv.PAGE_TOKENS, window=window
            )
        return Tables(
            send(torch.tensor(slots), device),
            _padded([table_of(piece, group) for piece in self.decodes], device),
            send(torch.tensor([p.stop for p in self.decodes], dtype=torch.int32), device),
            piece_tables,
            plan,
        )


def kernels_for(device: torch.device) -> ModuleType:
    """The attention functions for a device; Triton is imported only where there is one."""
    if device.type != "cuda":
        return attention_pages
    from service.engine import attention_cuda

    return attention_cuda


def table_of(piece: Piece, group: int) -> list[int]:
    """The pages of a piece's sequence in one group."""
    hold = piece.sequence.hold
    if not isinstance(hold, PageHold):
        raise RuntimeError(f"sequence {piece.sequence.id} holds no pages")
    return hold.tables[group]


def _kept(layer: Layer, budget: Budget) -> tuple[int, int | None]:
    """Tokens of one sequence, and the window if it is what limits them."""
    kept = kv.kept_tokens(
        budget.context, layer.window, on_cuda=True, step_tokens=budget.step_tokens
    )
    whole = kv.kept_tokens(budget.context, None, on_cuda=True)
    return kept, layer.window if kept < whole else None


def _group(kept: tuple[int, int | None], budget: Budget) -> Group:
    tokens, window = kept
    pool = kv.pool_tokens(
        budget.kv_tokens,
        budget.context,
        budget.sequences,
        window,
        on_cuda=True,
        step_tokens=budget.step_tokens,
    )
    ring = None if window is None else tokens // kv.PAGE_TOKENS
    return Group(pool // kv.PAGE_TOKENS - 1, ring)


def _padded(tables: list[list[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, tables), default=0)
    rows = [table + [0] * (width - len(table)) for table in tables]
    return send(torch.tensor(rows, dtype=torch.int32).view(len(rows), width), device)


def _pages(shape: tuple[int, ...], layer: Layer) -> torch.Tensor:
    return torch.zeros(shape, dtype=layer.dtype, device=layer.device)


def capturable(model: "PreTrainedModel", cache: PageCache) -> torch.device | None:
    """The one CUDA device that all of the model and its cache are on, or None."""
    only = only_device(model)
    if only is None or only.type != "cuda":
        return None
    return only if all(layer.device == only for layer in cache.layers.values()) else None
