"""Keys and values in slots, and attention over them on the CPU.

Every layer has one tensor, [slots, KV heads, tokens, size], in which the tokens of a sequence lie
in one piece: attention reads views, nothing is gathered. A layer with a sliding window keeps a ring
of one window: the token at position p lies at p modulo its length. That order is of no matter to
attention, since positions are in the keys already.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy
import torch
from torch.nn.functional import scaled_dot_product_attention

from service.engine.attention import Layer
from service.engine.attention import attend_dense
from service.engine.scheduler import Batch
from service.engine.scheduler import Piece
from service.engine.slots import SlotHold
from service.placement import kv

# What one more call of the attention kernel costs, as bytes of keys and values that could be read
# instead: sequences of unlike length are attended apart when padding them would read more.
CALL_BYTES = 200_000
# keys of all heads of a call: with fewer, two products and what lies between cost more than SDPA
FEWEST_MULTIPLIED = 2048
# Products in bfloat16 are read so many keys at a time: oneDNN makes a kernel for each new length,
# which takes a millisecond and is kept, in up to 3 MB
ROUNDED_KEYS = 32


class SlotCache:
    """The tensors. Engine thread only."""

    def __init__(self, layers: Mapping[int, Layer], slots: int, context: int) -> None:
        self.layers = layers
        self.lengths = {
            index: kv.kept_tokens(context, layer.window, on_cuda=False)
            for index, layer in layers.items()
        }
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        for index, layer in layers.items():
            shape = (slots, layer.heads, self.lengths[index])
            self.keys[index] = _zeros((*shape, layer.key_size), layer.dtype)
            self.values[index] = _zeros((*shape, layer.value_size), layer.dtype)

    def prepare(self, hold: SlotHold, start: int) -> None:
        """Before a sequence's first piece, from `start` on: copy the beginning that it shares into
        its slot, and wipe what may be NaN behind.
        """
        tensors = (*self.keys.values(), *self.values.values())
        if hold.copy_from is not None:
            for tensor in tensors:
                tensor[hold.slot, :, : hold.copied] = tensor[hold.copy_from, :, : hold.copied]
            hold.copy_from = None
        if hold.stale > start:
            for tensor in tensors:
                tensor[hold.slot, :, start : hold.stale] = 0
        hold.stale = 0

    def order(self, batch: Batch) -> tuple[Piece, ...]:
        """By slot, so that neighbours attend in one call."""
        return tuple(sorted(batch.decodes, key=_slot))

    def step(self, decodes: tuple[Piece, ...], prefills: tuple[Piece, ...]) -> "SlotStep":
        """What the attention layers see; prepares the slots of new sequences first."""
        for piece in prefills:
            if isinstance(piece.sequence.hold, SlotHold):
                self.prepare(piece.sequence.hold, piece.start)
        return SlotStep(self, decodes, prefills)

    @property
    def bytes(self) -> dict[str, int]:
        """Reserved, by device. The system commits them as they are first written."""
        tensors = (*self.keys.values(), *self.values.values())
        return {"cpu": sum(tensor.numel() * tensor.itemsize for tensor in tensors)}


@dataclass(frozen=True)
class _Run:
    """Neighbouring slots whose next tokens attend in one call: rows of the step, view, mask."""

    first_slot: int
    first_row: int
    rows: int
    view: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Plan:
    """What layers of one length have in common in one step."""

    write_at: torch.Tensor
    runs: tuple[_Run, ...]


class SlotStep:
    """One step over a SlotCache. decodes must be sorted by slot."""

    def __init__(self, cache: SlotCache, decodes: List[Piece], prefills: List[Piece]) -> None:
        self._cache = cache
        self._decodes = decodes
        self._slots = [_slot(piece) for piece in decodes]
        self._rows = torch.tensor(self._slots)
        self._prefills = [(_slot(piece), piece.start, len(piece.ids)) for piece in prefills]
        self._plans: dict[tuple[int, int], _Plan] = {}
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        # what was in the rings before: tensor, places, content
        self._overwritten: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        shape = self._cache.layers[layer]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = query.new_empty(query.shape[0], query.shape[1], shape.value_size)
        count = len(self._slots)
        if count:
            plan = self._plan(layer, shape)
            keys[self._rows, :, plan.write_at] = key[:count]
            values[self._rows, :, plan.write_at] = value[:count]
            for run in plan.runs:
                rows = slice(run.first_row, run.first_row + run.rows)
                slots = slice(run.first_slot, run.first_slot + run.rows)
                out[rows] = _decode(
                    query[rows],
                    keys[slots, :, : run.view],
                    values[slots, :, : run.view],
                    scale,
                    run.mask,
                    shape.softcap,
                )
        offset = count
        for slot, start, tokens in self._prefills:
            rows = slice(offset, offset + tokens)
            out[rows] = self._prefill(
                keys[slot], values[slot], start, query[rows], key[rows], value[rows], scale, shape
            )
            offset += tokens
        return out

    def undo(self) -> None:
        """Bring back what pieces of prompts wrote over in rings, so that they can be run again."""
        while self._overwritten:
            tensor, places, content = self._overwritten.pop()
            tensor[:, places] = content

    def _plan(self, layer: int, shape: Layer) -> _Plan:
        """Made once for all layers of the same length and size."""
        length = self._cache.lengths[layer]
        token_bytes = shape.heads * (shape.key_size + shape.value_size) * shape.dtype.itemsize
        plan = self._plans.get((length, token_bytes))
        if plan is None:
            held = [min(piece.start + 1, length) for piece in self._decodes]
            plan = _Plan(
                torch.tensor([piece.start % length for piece in self._decodes]),
                tuple(_runs(self._slots, held, token_bytes, length, shape)),
            )
            self._plans[length, token_bytes] = plan
        return plan

    def _prefill(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        shape: Layer,
    ) -> torch.Tensor:
        """A piece of one prompt. keys and values: one slot, [KV heads, tokens, size]."""
        count, length = query.shape[0], keys.shape[1]
        stop = start + count
        if stop > length:
            out = _attend_ring(keys, values, start, query, key, value, scale, shape)
            kept = min(count, length)
            places = torch.arange(stop - kept, stop) % length
            for ring, new in ((keys, key), (values, value)):
                self._overwritten.append((ring, places, ring[:, places]))
                ring[:, places] = new[count - kept :].transpose(0, 1)
            return out
        keys[:, start:stop] = key.transpose(0, 1)
        values[:, start:stop] = value.transpose(0, 1)
        if start == 0:
            return attend_dense(query, key, value, scale, None, shape.softcap, causal=True)
        seen = keys[:, :stop].transpose(0, 1), values[:, :stop].transpose(0, 1)
        mask = self._masks.get((start, stop))
        if mask is None:
            mask = torch.ones(count, stop, dtype=torch.bool).tril(start)
            self._masks[start, stop] = mask
        return attend_dense(query, *seen, scale, mask, shape.softcap)


def _attend_ring(
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    shape: Layer,
) -> torch.Tensor:
    """Attention of a piece that does not fit a ring, to the ring's tokens and its own."""
    length, count = keys.shape[1], query.shape[0]
    stop = start + count
    held = min(start, length)
    # the ring's place j holds the last position before `start` that is j modulo its length
    places = torch.arange(held)
    before = start - 1 - (start - 1 - places) % length
    positions = torch.cat([before, torch.arange(start, stop)])
    behind = torch.arange(start, stop)[:, None] - positions
    mask = (behind >= 0) & (behind < (shape.window or stop))
    seen_keys = torch.cat([keys[:, :held].transpose(0, 1), key])
    seen_values = torch.cat([values[:, :held].transpose(0, 1), value])
    return attend_dense(query, seen_keys, seen_values, scale, mask, shape.softcap)


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """query [n, heads, size], keys and values [n, KV heads, tokens, size], mask float32.

    Heads that share keys are folded into the query's token axis: the keys are read once for all of
    them, and a call takes a quarter of the time of `enable_gqa`, which repeats the keys.
    """
    count, heads, size = query.shape
    kv_heads = keys.shape[1]
    folded = query.reshape(count, kv_heads, heads // kv_heads, size)
    if _by_products(keys.dtype, softcap, count * kv_heads * keys.shape[2]):
        out = _multiplied(folded, keys, values, scale, mask, softcap)
    else:
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(count, heads, values.shape[-1])


def _multiplied(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """query [n, KV heads, group, size]. Attention as two products of matrices: in bfloat16 and with
    many keys less work than SDPA's CPU kernel, whose blocks are made for long queries.

    Keys times queries, because torch copies transposed keys several times as slowly. Scores are
    rounded to the dtype once, as in transformers' own eager attention; what follows is float32.
    """
    count, kv_heads, group, _ = query.shape
    products = torch.bmm(keys.flatten(0, 1), query.flatten(0, 1).transpose(1, 2))
    scores = products.view(count, kv_heads, -1, group).transpose(2, 3).float().mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores += mask
    shares = scores.softmax(-1).to(values.dtype).flatten(0, 1)
    return torch.bmm(shares, values.flatten(0, 1)).view(count, kv_heads, group, -1)


def _by_products(dtype: torch.dtype, softcap: float | None, keys: int) -> bool:
    """Whether a call with so many keys, of all heads, is for `_multiplied`: what SDPA has not, and
    what it is slower at.
    """
    return softcap is not None or (dtype == torch.bfloat16 and keys >= FEWEST_MULTIPLIED)


def _runs(
    slots: List[int], held: List[int], token_bytes: int, length: int, shape: Layer
) -> list[_Run]:
    """Cut the rows where slots are no neighbours, or where padding would cost more than a call.

    length: tokens that a slot has room for.
    """
    runs: list[_Run] = []
    first = 0
    longest = 0
    for row in range(len(slots) + 1):
        if row > first:
            grown = max(longest, held[row]) if row < len(slots) else 0
            wasted = (grown - longest) * (row - first) + (grown - held[row]) if grown else 0
            if grown and slots[row] == slots[row - 1] + 1 and wasted * token_bytes <= CALL_BYTES:
                longest = grown
                continue
            lengths = held[first:row]
            view, keys = longest, (row - first) * shape.heads * longest
            if shape.dtype == torch.bfloat16 and _by_products(shape.dtype, shape.softcap, keys):
                view = min(length, -(-longest // ROUNDED_KEYS) * ROUNDED_KEYS)
            runs.append(_Run(slots[first], first, row - first, view, _padding(lengths, view)))
        if row < len(slots):
            first, longest = row, held[row]
    return runs


def _padding(held: List[int], view: int) -> torch.Tensor | None:
    """Additive mask [n, 1, 1, view], float32, that hides what is no token of a sequence."""
    if all(count == view for count in held):
        return None
    hidden = torch.arange(view) >= torch.tensor(held)[:, None]
    mask = torch.zeros(len(held), view)
    return mask.masked_fill_(hidden, float("-inf"))[:, None, None]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only as they are written; torch's own write them all at once."""
    raw = numpy.zeros(math.prod(shape) * dtype.itemsize, numpy.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _slot(piece: Piece) -> int:
    hold = piece.sequence.hold
    if not isinstance(hold, SlotHold):
        raise RuntimeError(f"sequence {piece.sequence.id} holds no slot")
    return hold.slot
