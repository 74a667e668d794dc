"""Decode steps on one CUDA device, captured as CUDA graphs, one for every size of batch.

A step of a large model is some thousand small kernels; launching them from Python takes longer than
running them. A graph replays them in one call. Its inputs lie where they lay when it was captured,
and it ends by making the next step's inputs out of its own tokens, so that a step can follow
another without the host in between.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
import torch

from service.engine import attention
from service.engine import choosing
from service.engine.editing import upload
from service.engine.page_cache import PageCache
from service.engine.page_cache import table_of
from service.engine.ragged import Run
from service.engine.scheduler import Batch
from service.placement import kv
from service.placement.inputs import PlaceInputs
from service.placement.inputs import place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# Batches are padded to the next of these: padding costs less than a graph for every size.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


@dataclass(frozen=True)
class Replayed:
    """What a replay gives, on the device: float logits [n, vocabulary], tokens and whether the
    logits are finite, as `choosing.greedy`. The logits last until the next replay.
    """

    logits: torch.Tensor
    likeliest: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Room:
    """What all graphs of a device have in common, so that they keep no more than the largest does.

    They are captured on `stream`, take their memory from `pool`, and leave their logits in
    `logits`, [most sequences, vocabulary].
    """

    device: torch.device
    stream: torch.cuda.Stream
    pool: Any
    logits: torch.Tensor


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    output: Replayed


class Graphs:
    """Engine thread only."""

    def __init__(
        self,
        model: "PreTrainedModel",
        place_inputs: PlaceInputs,
        cache: PageCache,
        device: torch.device,
        max_sequences: int,
        run: Run,
    ) -> None:
        """Capture every size up to `max_sequences`. run: the model, or what is called for it.

        room: for other graphs of the device. Raises whatever the model's forward does that a graph
        cannot hold, such as a RuntimeError where it waits for the device.
        """
        self._model = model
        self._run = run
        self._place_inputs = place_inputs
        self._cache = cache
        self._device = device
        fitting = [size for size in SIZES if size < max_sequences]
        self.most = min(max_sequences, SIZES[-1])
        self._sizes = (*fitting, self.most)
        self._ids = self._zeros(self.most)
        self._positions = self._zeros(self.most)
        self._advance = self._zeros(self.most)
        self._tables = [
            self._zeros(self.most, cache.width).int() + group.pages for group in cache.groups
        ]
        self._members: list[object] = []  # the holds whose tables lie in the rows
        self._written: list[int] = []
        self._graphs: Mapping[int, _Graph] = {}
        with torch.cuda.device(device):
            self.room = Room(
                device,
                torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
                torch.cuda.graph_pool_handle(),
                self._dry_run(),
            )
            # the largest first: the others find room in its memory
            self._graphs = {size: self._capture(size) for size in reversed(self._sizes)}

    def replay(self, batch: Batch) -> Replayed:
        """Run a step of decodes. Rows are in the order of batch.decodes."""
        count = len(batch.decodes)
        size = next(size for size in self._sizes if size >= count)
        if not batch.follows:
            self._begin(batch, size)
        self._update_tables(batch)
        captured = self._graphs[size]
        captured.graph.replay()
        tokens, finite = captured.output.likeliest
        return Replayed(captured.output.logits[:count], (tokens[:count], finite[:count]))

    def _begin(self, batch: Batch, size: int) -> None:
        """New members: their tokens and positions, and rows of padding behind them."""
        count = len(batch.decodes)
        ids = [piece.ids[0] for piece in batch.decodes]
        inputs = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([[piece.start for piece in batch.decodes]]),
        }
        placed = place(self._place_inputs, self._model, inputs)
        self._ids[:count] = placed["input_ids"][0]
        self._positions[:count] = placed["position_ids"][0]
        members = [piece.sequence.hold for piece in batch.decodes]
        if members == self._members:
            return
        self._ids[count:size] = 0
        self._positions[count:size] = 0
        self._advance[:count] = 1
        self._advance[count:size] = 0
        for group, table in zip(self._cache.groups, self._tables, strict=True):
            table[count:size] = group.pages  # the page for padding
        self._members = members
        self._written = [0] * count

    def _update_tables(self, batch: Batch) -> None:
        """Upload the rows of page tables that have grown since the last step."""
        lengths = [len(table_of(piece, 0)) for piece in batch.decodes]
        if lengths == self._written:
            return
        changed = [row for row, length in enumerate(lengths) if length != self._written[row]]
        rows = upload(changed, np.int64, self._device)
        for group, table in enumerate(self._tables):
            pages = [table_of(batch.decodes[row], group) for row in changed]
            width = max(map(len, pages))
            padded = [its + [0] * (width - len(its)) for its in pages]
            table[rows, :width] = upload(padded, np.int32, self._device)
        self._written = lengths

    def _step(self, size: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """What is captured: one token of each row, and the next step's inputs.

        Returns the logits [size, vocabulary] and what `choosing.greedy` makes of them.
        """
        ids, positions = self._ids[:size], self._positions[:size]
        with attention.bound(_DecodeStep(self._cache, positions, self._tables, size)):
            logits = self._run(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                return_dict=True,
                logits_to_keep=0,
            ).logits[0]
        likeliest = choosing.greedy(logits)
        ids.copy_(likeliest[0])
        positions.add_(self._advance[:size])
        return logits, likeliest

    def _dry_run(self) -> torch.Tensor:
        """Steps outside of a graph: kernels compile, libraries reserve what they need.

        Returns room for the logits of the largest size.
        """
        room = torch.empty_like(self._step(self.most)[0])
        for size in reversed(self._sizes[:-1]):
            self._step(size)
        return room

    def _capture(self, size: int) -> _Graph:
        graph, room = torch.cuda.CUDAGraph(), self.room
        # other threads may ask the driver something meanwhile, such as how much memory is free
        with torch.cuda.graph(
            graph, pool=room.pool, stream=room.stream, capture_error_mode="thread_local"
        ):
            logits, likeliest = self._step(size)
            # Every graph leaves its logits in the same place: what a graph made and is still held
            # cannot be used by the others, and logits are large.
            kept = room.logits[:size]
            kept.copy_(logits)
        return _Graph(graph, Replayed(kept, likeliest))

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)


class _DecodeStep:
    """One token of every row; where it is kept is computed from its position, on the device."""

    def __init__(
        self, cache: PageCache, positions: torch.Tensor, tables: list[torch.Tensor], size: int
    ) -> None:
        self._cache = cache
        self._tables = [table[:size] for table in tables]
        self._lengths = (positions + 1).int()
        page = (positions // kv.PAGE_TOKENS)[:, None]
        self._slots = [
            table.gather(1, page)[:, 0].long() * kv.PAGE_TOKENS + positions % kv.PAGE_TOKENS
            for table in self._tables
        ]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        group = self._cache.group_of[layer]
        self._cache.write(layer, key, value, self._slots[group])
        return self._cache.decode(layer, query, self._tables[group], self._lengths, scale)
