"""Whether the fast path gives this model's own logits: asked before it serves."""

import statistics
from typing import TYPE_CHECKING

import torch

from service.engine.attention import NotCarried
from service.engine.params import SamplingParams
from service.engine.ragged import Ragged
from service.engine.scheduler import Batch
from service.engine.scheduler import Piece
from service.engine.sequence import Sequence
from service.engine.sequence import Stream
from service.placement.inputs import PlaceInputs
from service.placement.inputs import place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST = 24
# ids are spread over the vocabulary by a step prime to most sizes
STRIDE = 7919
# Largest |a - b| / |b| of logits, rows centred, in the median row. On SmolLM2 another position is
# off by 0.8 to 1.3, three lost keys by 0.3 to 0.5; other kernels round differently, in bfloat16 by
# 0.03 to 0.04.
CLOSE = {torch.float32: 1e-2, torch.float64: 1e-2}
CLOSE_HALF = 0.12


def prompt_for(vocabulary: int, capacity: int) -> tuple[int, ...]:
    """The tokens of the trial; fewer where the context is shorter."""
    return tuple(i * STRIDE % vocabulary for i in range(1, min(LONGEST, capacity) + 1))


def own_logits(
    model: "PreTrainedModel", place_inputs: PlaceInputs, ids: tuple[int, ...]
) -> torch.Tensor:
    """Logits of every position by the model's own attention, float32 [positions, vocabulary], on
    the CPU.
    """
    inputs = place(place_inputs, model, {"input_ids": torch.tensor([ids])})
    logits: torch.Tensor = model(**inputs, use_cache=False, return_dict=True).logits[0]
    return logits.float().cpu()


def prove(path: Ragged, ids: tuple[int, ...], expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Run two ragged sequences, both the beginning of `ids`, and compare with `expected`.

    One is prefilled in two pieces, the second of them beside the other's decode; then both decode.
    The first is alone where only one sequence can run. Raises NotCarried with the difference.
    """
    if len(ids) < 4:
        return
    half, a, b = (len(ids) - 1) // 2, len(ids) - 1, len(ids) // 2
    long, short = _sequence(ids[:a], 0), _sequence(ids[:b], 1)
    if not path.memory.admit(long):
        raise NotCarried("its cache has no room for a short sequence")
    both = path.memory.admit(short)
    off: list[float] = []
    try:
        for batch in (
            Batch((), (_piece(long, ids, 0, half), _piece(short, ids, 0, b))),
            Batch((_piece(short, ids, b, b + 1),), (_piece(long, ids, half, a),)),
            Batch((_piece(long, ids, a, a + 1), _piece(short, ids, b + 1, b + 2)), ()),
        ):
            if not both:
                batch = _without(batch, short)
            for piece in batch.pieces:
                path.memory.grow(piece.sequence, piece.stop)
            sampling, rows = path.logits(batch)
            for piece, row in zip(sampling, rows.float().cpu(), strict=True):
                off.append(difference(row, expected[piece.stop - 1]))
                piece.sequence.computed = piece.stop
    finally:
        for sequence in (long, short):
            path.memory.free(sequence, failed=True)
    worst = statistics.median(off)
    if not close(worst, dtype):
        raise NotCarried(f"its logits on the ragged path are {worst:.2g} off from its own")


def alone(path: Ragged) -> None:
    """Run a sequence of one token by itself: a shape that `prove` does not have."""
    sequence = _sequence((0,), 0)
    if not path.memory.admit(sequence):
        raise NotCarried("its cache has no room for a short sequence")
    try:
        path.memory.grow(sequence, 1)
        path.logits(Batch((), (_piece(sequence, (0,), 0, 1),)))
    finally:
        path.memory.free(sequence, failed=True)


def close(off: float, dtype: torch.dtype) -> bool:
    """Whether a `difference` of logits is rounding. dtype: what the model computes in."""
    return off <= CLOSE.get(dtype, CLOSE_HALF)


def _sequence(ids: tuple[int, ...], number: int) -> Sequence:
    return Sequence(-1 - number, ids, SamplingParams(max_tokens=2), Stream(len(ids)))


def _without(batch: Batch, sequence: Sequence) -> Batch:
    decodes = tuple(piece for piece in batch.decodes if piece.sequence is not sequence)
    prefills = tuple(piece for piece in batch.prefills if piece.sequence is not sequence)
    return Batch(decodes, prefills)


def _piece(sequence: Sequence, ids: tuple[int, ...], start: int, stop: int) -> Piece:
    return Piece(sequence, ids[start:stop], start, samples=True)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| of logits, rows centred."""
    found, expected = found - found.mean(), expected - expected.mean()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-6))
