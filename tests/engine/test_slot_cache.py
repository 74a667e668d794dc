"""Attention over slots against naive attention in float64, with poison where nothing may be read.

What lies behind a sequence's tokens in its slot is finite, because slots are wiped, and may be
read, but must not count.
"""

import math
import random

import pytest
import torch

from service.engine import slot_cache
from service.engine.attention import Layer
from service.engine.scheduler import Piece
from service.engine.slot_cache import SlotCache
from service.engine.slots import SlotHold
from tests.engine.sequences import sequence
from tests.support.paged import fresh_seed

CONTEXT = 96
SLOTS = 9
SIZE = 64
SCALE = 0.11
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def layer(dtype: torch.dtype, window: int | None = None, softcap: float | None = None) -> Layer:
    return Layer(torch.device("cpu"), dtype, 2, SIZE, SIZE, window, softcap)


def decode(slot: int, position: int) -> Piece:
    one = sequence(position + 1)
    one.hold = SlotHold(slot)
    return Piece(one, (0,), position, True)


def naive(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """query [heads, size], keys and values [KV heads, tokens, size], all of them seen."""
    query, keys, values = query.double(), keys.double(), values.double()
    group = len(query) // len(keys)
    rows = []
    for head, one in enumerate(query):
        scores = keys[head // group] @ one * SCALE
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(scores.softmax(0) @ values[head // group])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("dtype", "fewest"),
    [(torch.bfloat16, 0), (torch.bfloat16, math.inf), (torch.float32, 0)],
    ids=["bfloat16 multiplied", "bfloat16 by SDPA", "float32"],
)
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_decodes_see_the_tokens_of_their_own_slots_and_no_others(
    dtype: torch.dtype,
    fewest: float,
    window: int | None,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slot_cache, "FEWEST_MULTIPLIED", fewest)
    seed = fresh_seed()
    torch.manual_seed(seed)
    chance = random.Random(seed)
    cache = SlotCache({0: layer(dtype, window, softcap)}, SLOTS, CONTEXT)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.copy_(torch.randn(tensor.shape))
    slots = sorted(chance.sample(range(SLOTS), 6))
    pieces = tuple(decode(slot, chance.randrange(CONTEXT)) for slot in slots)
    for slot in set(range(SLOTS)) - set(slots):
        cache.keys[0][slot] = cache.values[0][slot] = math.nan
    query = torch.randn(len(slots), 6, SIZE).to(dtype)
    key, value = torch.randn(2, len(slots), 2, SIZE).to(dtype)
    out = cache.step(pieces, ()).attend(0, query, key, value, SCALE)
    assert (out.dtype, out.shape) == (dtype, query.shape)
    length = cache.lengths[0]
    for row, piece in enumerate(pieces):
        place, held = piece.start % length, min(piece.start + 1, length)
        keys, values = cache.keys[0][slots[row]], cache.values[0][slots[row]]
        assert torch.equal(keys[:, place], key[row])
        assert torch.equal(values[:, place], value[row])
        expected = naive(query[row], keys[:, :held], values[:, :held], softcap)
        assert (out[row].double() - expected).norm() <= CLOSE[dtype] * expected.norm()
