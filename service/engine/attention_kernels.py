"""Triton kernels over paged keys and values; `attention_cuda` launches them and says what they do.

Sizes that are no power of two are padded by masked lanes: they cost registers, not bandwidth.
Offsets into the pages are 64-bit: one layer's pages may exceed 2**31 elements.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def copy_rows(
    key_from,
    value_from,
    key_to,
    value_to,
    slots,
    key_from_row,
    key_from_head,
    key_from_lane,
    value_from_row,
    value_from_head,
    value_from_lane,
    key_to_row,
    key_to_head,
    value_to_row,
    value_to_head,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    KEY: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_TO: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Copy a token's keys and values: into row `slots[t]`, or with GATHER from it.

    Value lanes from VALUE to VALUE_TO are filled with zeros. Grid: (tokens, blocks of heads).
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    source = slot if GATHER else token
    target = token if GATHER else slot
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    there = (head < HEADS)[:, None]

    lane = tl.arange(0, KEY_BLOCK)
    kept = there & (lane < KEY)[None, :]
    at = source * key_from_row + head[:, None] * key_from_head + lane[None, :] * key_from_lane
    key = tl.load(key_from + at, mask=kept)
    tl.store(
        key_to + target * key_to_row + head[:, None] * key_to_head + lane[None, :], key, mask=kept
    )

    lane = tl.arange(0, VALUE_BLOCK)
    kept = there & (lane < VALUE)[None, :]
    at = source * value_from_row + head[:, None] * value_from_head + lane[None, :] * value_from_lane
    value = tl.load(value_from + at, mask=kept, other=0.0)
    tl.store(
        value_to + target * value_to_row + head[:, None] * value_to_head + lane[None, :],
        value,
        mask=there & (lane < VALUE_TO)[None, :],
    )


@triton.jit
def cut(
    length, SPLITS: tl.constexpr, SHORTEST: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr
):
    """How a sequence is cut into splits: first visible position, base, tokens each, splits used.

    The base is the first visible position rounded down to a block, so that no block straddles
    two pages.
    """
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    base = first // BLOCK * BLOCK
    tokens = length - base
    span = tl.maximum(tl.cdiv(tl.cdiv(tokens, SPLITS), BLOCK) * BLOCK, SHORTEST)
    used = tl.maximum(tl.cdiv(tokens, span), 1)
    return first, base, span, used


@triton.jit
def decode_splits(
    query,
    key_pages,
    value_pages,
    tables,
    lengths,
    out,
    partial,
    weights,
    scale,
    softcap,
    query_row,
    query_head,
    query_lane,
    key_page,
    key_slot,
    key_head,
    value_page,
    value_slot,
    value_head,
    table_row,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    KEY: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Attention of one group of query heads over one split of one sequence's visible keys.

    A sequence that needs one split is finished here, in `out` [n, heads, VALUE]; otherwise the
    split's normalised sum goes to `partial` [n, heads, SPLITS, VALUE] and the base-2 logarithm of
    its weight to `weights` [n, heads, SPLITS], both float32. Grid: (kv heads x TILES, n, SPLITS):
    neighbours in the grid read neighbouring memory.
    """
    kv_head = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    first, base, span, used = cut(length, SPLITS, SHORTEST, WINDOW, BLOCK)
    if split < used:
        low = base + split * span
        high = tl.minimum(low + span, length)
        member = tile * GROUP_BLOCK + tl.arange(0, GROUP_BLOCK)
        head = kv_head * GROUP + member
        grouped = (member < GROUP)[:, None]
        lane = tl.arange(0, KEY_BLOCK)
        value_lane = tl.arange(0, VALUE_BLOCK)
        offset = tl.arange(0, BLOCK)
        q = tl.load(
            query + row * query_row + head[:, None] * query_head + lane[None, :] * query_lane,
            mask=grouped & (lane < KEY)[None, :],
            other=0.0,
        )
        largest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_BLOCK], tl.float32)
        summed = tl.zeros([GROUP_BLOCK, VALUE_BLOCK], tl.float32)
        for start in range(low, high, BLOCK):
            position = start + offset
            # Every block has a visible position, so `largest` is finite after the first one.
            seen = (position >= first) & (position < high)
            if PAGE % BLOCK == 0:
                page = tl.load(tables + row * table_row + start // PAGE).to(tl.int64)
                slot = start % PAGE + offset
            else:
                page = tl.load(tables + row * table_row + position // PAGE, mask=seen, other=0).to(
                    tl.int64
                )
                slot = position % PAGE
            keys_at = page * key_page + slot * key_slot + kv_head * key_head
            values_at = page * value_page + slot * value_slot + kv_head * value_head
            key_seen = seen[None, :]
            if KEY != KEY_BLOCK:
                key_seen = key_seen & (lane < KEY)[:, None]
            value_seen = seen[:, None]
            if VALUE != VALUE_BLOCK:
                value_seen = value_seen & (value_lane < VALUE)[None, :]
            k = tl.load(key_pages + keys_at[None, :] + lane[:, None], mask=key_seen, other=0.0)
            v = tl.load(
                value_pages + values_at[:, None] + value_lane[None, :], mask=value_seen, other=0.0
            )
            scores = tl.dot(q, k, input_precision="ieee") * scale
            if CAPPED:
                # tanh(x) = 1 - 2 / (exp(2 x) + 1), which neither end overflows
                scores = softcap - 2 * softcap / (tl.exp2(scores * (2 * LOG2E / softcap)) + 1)
            scores = tl.where(seen[None, :], scores * LOG2E, float("-inf"))
            now = tl.maximum(largest, tl.max(scores, 1))
            shrink = tl.exp2(largest - now)
            p = tl.exp2(scores - now[:, None])
            total = total * shrink + tl.sum(p, 1)
            summed = summed * shrink[:, None]
            summed += tl.dot(p.to(v.dtype), v, input_precision="ieee")
            largest = now
        # a row of length 0 saw nothing: zeros
        result = summed / tl.where(total == 0, 1.0, total)[:, None]
        written = grouped & (value_lane < VALUE)[None, :]
        at = row * HEADS + head
        if used == 1:
            tl.store(
                out + at[:, None] * VALUE + value_lane[None, :],
                result.to(out.dtype.element_ty),
                mask=written,
            )
        else:
            at = at * SPLITS + split
            tl.store(partial + at[:, None] * VALUE + value_lane[None, :], result, mask=written)
            tl.store(weights + at, largest + tl.log2(total), mask=member < GROUP)


@triton.jit
def join_splits(
    partial,
    weights,
    lengths,
    out,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    SHORTEST: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Join the splits of one query head into `out`, if there was more than one.

    Grid: (query heads, n).
    """
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + row)
    _, _, _, used = cut(length, SPLITS, SHORTEST, WINDOW, BLOCK)
    if used > 1:
        at = row * HEADS + tl.program_id(0)
        lane = tl.arange(0, VALUE_BLOCK)
        every = tl.arange(0, SPLITS)
        largest = tl.max(
            tl.load(weights + at * SPLITS + every, mask=every < used, other=float("-inf")), 0
        )
        total = tl.zeros([SPLIT_BLOCK], tl.float32)
        summed = tl.zeros([VALUE_BLOCK], tl.float32)
        for begin in range(0, used, SPLIT_BLOCK):
            split = begin + tl.arange(0, SPLIT_BLOCK)
            there = split < used
            logarithm = tl.load(weights + at * SPLITS + split, mask=there, other=float("-inf"))
            weight = tl.exp2(logarithm - largest)
            part = tl.load(
                partial + (at * SPLITS + split)[:, None] * VALUE + lane[None, :],
                mask=there[:, None] & (lane < VALUE)[None, :],
                other=0.0,
            )
            total += weight
            summed += tl.sum(part * weight[:, None], 0)
        result = summed / tl.sum(total, 0)
        tl.store(out + at * VALUE + lane, result.to(out.dtype.element_ty), mask=lane < VALUE)
