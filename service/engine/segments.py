"""Steps with pieces of prompts on one CUDA device: all but the attention of prompts, captured.

Launching the kernels of such a step one by one takes 30 ms with an 8B shape on an H200, however few
tokens it has. What the attention of prompts launches depends on who has how many tokens, so it is
called as it is; everything else depends on the number of tokens alone. One CUDA graph holds what
the model does from one attention layer to the next, for every size of step; a step is padded to the
next size.
"""

import contextlib
import types
from dataclasses import dataclass
from typing import Any
from typing import cast

import torch

from service.engine import attention
from service.engine.graphs import Room
from service.engine.page_cache import PageCache
from service.engine.page_cache import PageStep
from service.engine.ragged import Run
from service.placement import kv
from service.placement.inputs import send

# Tokens. Larger steps compute for longer than their kernels take to launch.
SIZES = (32, 64, 128, 192, 256, 320, 384, 512, 640, 768, kv.CAPTURED_TOKENS)


@dataclass(frozen=True)
class _Places:
    """Where graphs leave queries and find what attention made of them, [most tokens, heads, size].

    Layers of one shape share them.
    """

    query: torch.Tensor
    out: torch.Tensor


@dataclass(frozen=True)
class _Segment:
    """A graph, and the attention layer in which it ends."""

    graph: torch.cuda.CUDAGraph
    layer: int
    scale: float
    places: _Places


@dataclass(frozen=True)
class _Captured:
    segments: tuple[_Segment, ...]
    last: torch.cuda.CUDAGraph


class Segments:
    """Called in place of the model, with what `ragged.forward` gives it. Engine thread only.

    A step that is larger than all sizes is run as it is.
    """

    def __init__(self, run: Run, cache: PageCache, room: Room, *, most: int) -> None:
        """Capture every size up to `most` tokens. run: the model, or what is called for it.

        Raises whatever the model's forward does that a graph cannot hold, such as a RuntimeError
        where it waits for the device.
        """
        self._run = run
        self._cache = cache
        self._room = room
        self._sizes = tuple(size for size in SIZES if size <= most)
        self._most = max(self._sizes, default=0)
        self._rows = len(room.logits)
        self._ids = self._full(0, self._most)
        self._positions = self._full(0, self._most)
        self._keep = self._full(0, self._rows)
        # of every group: where tokens are kept, and the pages of sequences that decode
        self._slots = [
            self._full(group.pages * kv.PAGE_TOKENS, self._most) for group in cache.groups
        ]
        self._tables = [
            self._full(group.pages, self._rows, cache.width).int() for group in cache.groups
        ]
        self._lengths = self._full(1, self._rows).int()
        self._first = [  # a layer of every group
            next(layer for layer, its in cache.group_of.items() if its == group)
            for group in range(len(cache.groups))
        ]
        self._places: dict[tuple[torch.Size, int], _Places] = {}
        self._captured: dict[int, _Captured] = {}
        with torch.cuda.device(room.device):
            # outside of a graph: kernels compile, libraries reserve what they need
            for size in reversed(self._sizes):
                with attention.bound(_Trial(self)):
                    self._forward(size)
            torch.cuda.synchronize()
            # the largest first: the others find room in its memory
            with torch.cuda.stream(room.stream):
                for size in reversed(self._sizes):
                    self._captured[size] = self._capture(size)
            torch.cuda.synchronize()

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor,
        **others: Any,
    ) -> Any:
        """ids and positions int64 [1, T]; logits_to_keep: rows, int64 on the CPU.

        `logits` of the result, [1, rows, vocabulary], last until the next step.
        """
        step = cast("PageStep", attention.current())
        tokens, decodes = input_ids.shape[1], len(step.decodes)
        wanted = len(logits_to_keep)
        if tokens > self._most or max(wanted, decodes) > self._rows:
            return self._run(
                input_ids=input_ids,
                position_ids=position_ids,
                logits_to_keep=logits_to_keep,
                **others,
            )
        size = next(size for size in self._sizes if size >= tokens)
        self._ids[:tokens] = input_ids[0]
        self._positions[:tokens] = position_ids[0]
        rows = torch.zeros(self._rows, dtype=torch.int64)  # what is not wanted is row 0 again
        rows[:wanted] = logits_to_keep
        self._keep.copy_(send(rows, self._room.device))
        self._bring(step, tokens)
        captured = self._captured[size]
        for segment in captured.segments:
            segment.graph.replay()
            if step.prefills:
                places = segment.places
                places.out[decodes:tokens] = step.attend_prefills(
                    segment.layer, places.query[decodes:tokens], segment.scale
                )
        captured.last.replay()
        return types.SimpleNamespace(logits=self._room.logits[None, :wanted])

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> _Places:
        """What is captured of an attention layer: keys and values are kept, and the first rows
        attend as those of sequences that decode.
        """
        group, tokens = self._cache.group_of[layer], len(query)
        rows = min(tokens, self._rows)
        self._cache.write(layer, key, value, self._slots[group][:tokens])
        places = self._places_of(query, self._cache.layers[layer].value_size)
        places.query[:tokens] = query
        places.out[:rows] = self._cache.decode(
            layer, query[:rows], self._tables[group][:rows], self._lengths[:rows], scale
        )
        return places

    def _bring(self, step: PageStep, tokens: int) -> None:
        """Where the step's tokens are kept, and what the sequences that decode can see."""
        decodes = len(step.decodes)
        self._lengths.fill_(1)
        for group, slots in enumerate(self._slots):
            tables = step.tables(self._first[group])
            slots[:tokens] = tables.slots
            slots[tokens:] = self._cache.groups[group].pages * kv.PAGE_TOKENS
            self._tables[group][:decodes, : tables.tables.shape[1]] = tables.tables
            self._lengths[:decodes] = tables.lengths

    def _places_of(self, query: torch.Tensor, value_size: int) -> _Places:
        """Those of layers of this shape. Made at a trial, before anything is captured."""
        found = self._places.get((query.shape[1:], value_size))
        if found is None:
            found = _Places(
                query.new_zeros(self._most, *query.shape[1:]),
                query.new_zeros(self._most, query.shape[1], value_size),
            )
            self._places[query.shape[1:], value_size] = found
        return found

    def _forward(self, size: int) -> torch.Tensor:
        """Logits of the rows to keep."""
        rows = min(size, self._rows)
        logits: torch.Tensor = self._run(
            input_ids=self._ids[None, :size],
            position_ids=self._positions[None, :size],
            use_cache=False,
            return_dict=True,
            logits_to_keep=self._keep[:rows],
        ).logits[0]
        return logits[:rows]

    def _capture(self, size: int) -> _Captured:
        recording = _Recording(self, self._room)
        try:
            recording.begin()
            with attention.bound(recording):
                logits = self._forward(size)
            self._room.logits[: len(logits)].copy_(logits)
            return _Captured(tuple(recording.segments), recording.end())
        except BaseException:
            recording.give_up()
            raise

    def _full(self, value: int, *shape: int) -> torch.Tensor:
        return torch.full(shape, value, dtype=torch.int64, device=self._room.device)


class _Trial:
    """A step outside of any graph."""

    def __init__(self, owner: Segments) -> None:
        self._owner = owner

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        return self._owner.attend(layer, query, key, value, scale).out[: len(query)].clone()


class _Recording:
    """A step whose attention layers end a graph and begin the next one."""

    def __init__(self, owner: Segments, room: Room) -> None:
        self.segments: list[_Segment] = []
        self._owner = owner
        self._room = room
        self._graph = torch.cuda.CUDAGraph()

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        places = self._owner.attend(layer, query, key, value, scale)
        self.segments.append(_Segment(self.end(), layer, scale, places))
        self.begin()
        # a copy: a compiled model takes the memory of what it no longer needs for something else
        return places.out[: len(query)].clone()

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # other threads may ask the driver something meanwhile, such as how much memory is free
        self._graph.capture_begin(pool=self._room.pool, capture_error_mode="thread_local")

    def end(self) -> torch.cuda.CUDAGraph:
        self._graph.capture_end()
        return self._graph

    def give_up(self) -> None:
        """Whatever happened: the stream captures no more."""
        with contextlib.suppress(Exception):  # CUDA says again what was raised already
            self._graph.capture_end()
