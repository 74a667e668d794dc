"""Attention over paged keys and values on CUDA: see `attention_pages` for layout and meaning.

Writing and decoding are our Triton kernels; prefill is PyTorch's flash attention over keys and
values gathered from the pages. Whatever these do not take goes to `attention_pages`, which takes
everything. No function here waits for the device, and `write` and `decode` can be captured in a
CUDA graph: what they launch depends on shapes only.

Import this only where a CUDA device is used: it needs Triton, which PyTorch's CUDA builds bring.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from itertools import pairwise
from typing import cast

import torch
from torch.nn.attention import varlen

from service.engine import attention_kernels as kernels
from service.engine import attention_pages
from service.placement.inputs import send

LARGEST_HEAD = 256
# Programs per multiprocessor that keep its memory pipes full; fewer are split along the keys.
PROGRAMS_EACH = 2
MOST_SPLITS = 64
# A batch that fills the device is split only so that one long sequence does not hold up the rest.
LONG_SPLIT = 16384
SHORT_SPLIT = 1024
# Shared memory a program may take, so that two fit on a multiprocessor of a large GPU.
SHARED_BYTES = 100 * 1024
# Keys gathered at once for prefill, unless one piece alone has more.
GATHERED_TOKENS = 2**16

Flash = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class PrefillPart:
    """Pieces whose keys are gathered together: queries `begin` to `end` of the step."""

    begin: int
    end: int
    slots: torch.Tensor  # int64 [keys]: where each visible key lies, piece after piece
    cu_q: torch.Tensor  # int32 [pieces + 1]: where each piece's queries begin
    cu_k: torch.Tensor  # int32 [pieces + 1]: where each piece's keys begin
    max_q: int
    max_k: int


@dataclass(frozen=True)
class PrefillPlan:
    """Where a step's prefill finds its keys: one for all layers with the same tables and window."""

    parts: tuple[PrefillPart, ...]


def plan_prefill(
    tables: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    *,
    page_size: int,
    window: int | None,
) -> PrefillPlan:
    """What `prefill` gathers; `tables`, `starts` and `lengths` as for `prefill`.

    The tensors are made on the device of `tables`. `prefill` needs memory for the keys of the
    largest part: `max(GATHERED_TOKENS, longest piece)` tokens x kv heads x 2 key sizes.
    """
    positions = [end - (starts[i + 1] - starts[i]) for i, end in enumerate(lengths)]
    firsts = [0 if window is None else max(0, at - window + 1) for at in positions]
    keys = [end - first for end, first in zip(lengths, firsts, strict=True)]
    parts: list[PrefillPart] = []
    low = 0
    while low < len(lengths):
        high = low + 1
        while high < len(lengths) and sum(keys[low : high + 1]) <= GATHERED_TOKENS:
            high += 1
        parts.append(
            _part(
                tables[low:high],
                starts[low : high + 1],
                firsts[low:high],
                keys[low:high],
                page_size,
            )
        )
        low = high
    return PrefillPlan(tuple(parts))


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Keep keys and values in the pages, in one launch; as `attention_pages.write`."""
    _copy(key, value, key_pages.view(-1, *key_pages.shape[2:]),
          value_pages.view(-1, *value_pages.shape[2:]), slots, gather=False)  # fmt: skip


def decode(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One new token per sequence; as `attention_pages.decode`. One launch, or two if split.

    The keys of a sequence are cut into splits that run side by side and are then joined. How many
    there may be depends on shapes only; how many a sequence uses, on its length.
    """
    n, heads, key_size = query.shape
    page, kv_heads, value_size = value_pages.shape[1:]
    if not _decodes(query, key_size, value_size):
        return attention_pages.decode(
            query, key_pages, value_pages, tables, lengths,
            scale=scale, window=window, softcap=softcap,
        )  # fmt: skip
    group = heads // kv_heads
    group_block = min(64, max(16, _power(group)))
    tiles = -(-group // group_block)
    key_block, value_block = max(16, _power(key_size)), max(16, _power(value_size))
    multiprocessors, shared = _device_limits(query.device)
    block, stages = _blocks(
        (key_block + value_block) * key_pages.element_size(),
        group_block * key_block * query.element_size(),
        shared,
    )
    width = tables.shape[1] * page
    seen = width if window is None else min(width, window + block)
    splits, shortest = _splits(n * kv_heads * tiles, seen, block, multiprocessors)
    out = query.new_empty((n, heads, value_size))
    partial = weights = out  # not touched with one split
    if splits > 1:
        partial = query.new_empty((n, heads, splits, value_size), dtype=torch.float32)
        weights = query.new_empty((n, heads, splits), dtype=torch.float32)
    # Triton launches on the current device, which need not be this layer's.
    with torch.cuda.device(query.get_device()):
        kernels.decode_splits[(kv_heads * tiles, n, splits)](
            query, key_pages, value_pages, tables, lengths, out, partial, weights,
            scale, softcap or 0.0,
            *query.stride(), *key_pages.stride()[:3], *value_pages.stride()[:3], tables.stride(0),
            HEADS=heads, GROUP=group, GROUP_BLOCK=group_block, TILES=tiles,
            KEY=key_size, KEY_BLOCK=key_block, VALUE=value_size, VALUE_BLOCK=value_block,
            PAGE=page, BLOCK=block, SPLITS=splits, SHORTEST=shortest, WINDOW=window or 0,
            CAPPED=softcap is not None, num_stages=stages,
            num_warps=_warps(group_block * value_block, query.dtype),
        )  # fmt: skip
        if splits > 1:
            kernels.join_splits[(heads, n)](
                partial, weights, lengths, out,
                HEADS=heads, VALUE=value_size, VALUE_BLOCK=value_block, BLOCK=block,
                SPLITS=splits, SPLIT_BLOCK=min(splits, 16), SHORTEST=shortest, WINDOW=window or 0,
                num_warps=1,
            )  # fmt: skip
    return out


def prefill(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    tables: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    plan: PrefillPlan | None = None,
) -> torch.Tensor:
    """Several new tokens per sequence; as `attention_pages.prefill`. Two launches a part.

    `plan` is `plan_prefill` of the same tables, starts, lengths and window; made here if None.
    """
    page, kv_heads, value_size = value_pages.shape[1:]
    key_size = query.shape[2]
    if softcap is not None or not _flashes(query, key_size, value_size):
        return attention_pages.prefill(
            query, key_pages, value_pages, tables, starts, lengths,
            scale=scale, window=window, softcap=softcap,
        )  # fmt: skip
    if plan is None:
        plan = plan_prefill(tables, starts, lengths, page_size=page, window=window)
    outs: list[torch.Tensor] = []
    for part in plan.parts:
        key = query.new_empty((len(part.slots), kv_heads, key_size))
        # Flash attention wants values as long as keys: padded by zeros, cut off again below.
        value = torch.empty_like(key)
        _copy(key_pages.view(-1, kv_heads, key_size), value_pages.view(-1, kv_heads, value_size),
              key, value, part.slots, gather=True)  # fmt: skip
        attended = _flash()(query[part.begin : part.end], key, value, part, scale, window)
        outs.append(attended[..., :value_size])
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _part(
    tables: torch.Tensor, starts: list[int], firsts: list[int], keys: list[int], page: int
) -> PrefillPart:
    queries = [start - starts[0] for start in starts]
    ends = list(accumulate(keys, initial=0))
    device = tables.device
    # One small copy, from pinned memory: from ordinary memory it would wait for the device.
    packed = send(torch.tensor(queries + ends + firsts), device)
    cu_q, cu_k, first = torch.split(packed, [len(queries), len(ends), len(firsts)])
    index = torch.arange(ends[-1], device=device)
    piece = torch.searchsorted(cu_k[1:], index, right=True)
    position = index - cu_k[piece] + first[piece]
    slots = tables[piece, position // page].long() * page + position % page
    longest = max(b - a for a, b in pairwise(queries))
    return PrefillPart(starts[0], starts[-1], slots, cu_q.int(), cu_k.int(), longest, max(keys))


def _copy(
    key: torch.Tensor,
    value: torch.Tensor,
    key_to: torch.Tensor,
    value_to: torch.Tensor,
    slots: torch.Tensor,
    *,
    gather: bool,
) -> None:
    """Rows [tokens, kv heads, size] of `key` and `value` into rows of `key_to` and `value_to`."""
    heads, key_size = key.shape[1:]
    value_size, padded = value.shape[2], value_to.shape[2] if gather else value.shape[2]
    key_block, value_block = _power(key_size), _power(padded)
    head_block = min(_power(heads), max(1, 1024 // max(key_block, value_block)))
    with torch.cuda.device(key.get_device()):
        kernels.copy_rows[(len(slots), -(-heads // head_block))](
            key, value, key_to, value_to, slots,
            *key.stride(), *value.stride(), *key_to.stride()[:2], *value_to.stride()[:2],
            HEADS=heads, HEAD_BLOCK=head_block, KEY=key_size, KEY_BLOCK=key_block,
            VALUE=value_size, VALUE_BLOCK=value_block, VALUE_TO=padded, GATHER=gather,
            num_warps=4,
        )  # fmt: skip


def _splits(programs: int, tokens: int, block: int, multiprocessors: int) -> tuple[int, int]:
    """Most splits (a power of two) of up to `tokens` keys, and fewest keys in one, from shapes."""
    wanted = -(-PROGRAMS_EACH * multiprocessors // programs)
    long = -(-tokens // LONG_SPLIT)
    most = min(MOST_SPLITS, _power(-(-tokens // block)))
    return min(most, _power(max(wanted, long))), block if wanted > 1 else SHORT_SPLIT


def _blocks(row_bytes: int, query_bytes: int, shared_bytes: int) -> tuple[int, int]:
    """Keys per block and blocks in flight that fit into a multiprocessor's shared memory.

    Measured on an H200: 32 keys are 5 % faster than 64 at 256 sequences, and no slower at one.
    """
    room = min(SHARED_BYTES, shared_bytes - query_bytes - 8 * 1024)
    for stages in (3, 2):
        for block in (32, 16):
            if stages * block * row_bytes <= room:
                return block, stages
    return 16, 1


def _warps(sums: int, dtype: torch.dtype) -> int:
    """Two keep the memory busiest; more where they could not hold the `sums` in registers.

    float32 has no exact tensor core product, and its plain one needs more registers.
    """
    if dtype == torch.float32:
        return min(16, max(4, sums // 512))
    return max(2, sums // 2048)


def _power(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


@functools.cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that one program may ask for."""
    if device.type != "cuda":  # Triton's interpreter
        return 8, SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(
        properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
    )
    return properties.multi_processor_count, shared


def _decodes(query: torch.Tensor, key_size: int, value_size: int) -> bool:
    """Whether our kernel takes such heads. Turing and older have no products in bf16."""
    if query.dtype == torch.bfloat16 and not _ampere(query.device):
        return False
    return max(key_size, value_size) <= LARGEST_HEAD


def _flashes(query: torch.Tensor, key_size: int, value_size: int) -> bool:
    """Whether PyTorch's flash attention takes such heads."""
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and key_size % 8 == 0
        and value_size <= key_size <= LARGEST_HEAD
        and _ampere(query.device)
    )


@functools.cache
def _ampere(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _flash() -> Flash:
    """The varlen flash attention of the PyTorch that is installed, with grouped heads.

    Its page tables are not used: they want pages of a multiple of 256 tokens.
    """
    grouped = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
    return _flash_public if grouped else _flash_aten


def _flash_public(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    part: PrefillPart,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """From PyTorch 2.13 on, perhaps 2.12: what `varlen_attn` offers."""
    left = -1 if window is None else window - 1
    attended = varlen.varlen_attn(
        query, key, value, part.cu_q, part.cu_k, part.max_q, part.max_k,
        scale=scale, window_size=(left, 0), enable_gqa=True,
    )  # fmt: skip
    return cast("torch.Tensor", attended)  # a tuple only for those who ask for more


def _flash_aten(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    part: PrefillPart,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """PyTorch 2.11: the operation under `varlen_attn`, which always took grouped heads."""
    left = -1 if window is None else window - 1
    attended: tuple[torch.Tensor, ...] = torch.ops.aten._flash_attention_forward(
        query, key, value, part.cu_q, part.cu_k, part.max_q, part.max_k,
        0.0, window is None, False,
        scale=scale, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    return attended[0]
