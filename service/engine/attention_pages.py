"""Attention over keys and values kept in pages, in plain torch, for any device.

Layout, here and in `attention_cuda`: `key_pages` [pages, page, kv heads, key size] and
`value_pages` [pages, page, kv heads, value size] belong to one layer. Position `p` of a sequence
lies at offset `p % page` of page `table[p // page]`. A sliding-window layer may repeat its pages
in a ring: a position that has left the window may be overwritten, so it is never looked at, nor
is an entry of a table behind which no visible position lies.

Query head `h` reads kv head `h // (query heads / kv heads)`. Scores are `scale * q.k`, then
`softcap * tanh(scores / softcap)` if `softcap` is given. With a `window`, a query at position `p`
sees the positions `p - window + 1 .. p`; otherwise all up to its own.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

# Queries of a piece attended at once: bounds the mask, and skips keys that none of them sees.
QUERY_ROWS = 256
# Elements of one float32 score matrix where it must be made in full (a soft cap): 256 MiB.
SCORES = 2**26


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Keep `key` [T, kv heads, key size] and `value` [T, kv heads, value size] in the pages.

    `slots` (int64 [T]) is `page * page_size + offset` of each token. Inputs may have any strides;
    the pages are contiguous. If several tokens name one slot, any of them may stay.
    """
    key_pages.view(-1, *key_pages.shape[2:]).index_copy_(0, slots, key.to(key_pages.dtype))
    value_pages.view(-1, *value_pages.shape[2:]).index_copy_(0, slots, value.to(value_pages.dtype))


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
    """One new token per sequence, already written: [n, query heads, value size].

    `query` [n, query heads, key size]; `tables` int32 [n, max_pages]; `lengths` int32 [n] counts
    the new token. A row of length 0 gives zeros. On the CPU each sequence is read where it lies,
    without a copy if it is in one page; elsewhere the batch is gathered in full, so that the host
    never waits for the device.
    """
    attend = decode_each if query.device.type == "cpu" else decode_gathered
    return attend(
        query, key_pages, value_pages, tables, lengths, scale=scale, window=window, softcap=softcap
    )


def decode_each(
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
    """`decode` sequence by sequence; reads `lengths` on the host, so for CPU tensors."""
    n, heads, key_size = query.shape
    kv_heads, value_size = value_pages.shape[2:]
    out = query.new_zeros((n, heads, value_size))
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        first = 0 if window is None else max(0, length - window)
        keys = _span(key_pages, tables[row], first, length)
        values = _span(value_pages, tables[row], first, length)
        # the group lies along the query axis: one product per kv head, keys read once
        grouped = query[row].reshape(kv_heads, 1, heads // kv_heads, key_size)
        attended = _attend(
            grouped, _heads_first(keys), _heads_first(values), None, scale=scale, softcap=softcap
        )
        out[row] = attended.reshape(heads, value_size)
    return out


def decode_gathered(
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
    """`decode` for the whole batch at once; shapes depend on shapes only, and no host wait.

    Takes memory for a copy of all the pages that the tables' width could name.
    """
    n, heads, key_size = query.shape
    count, page, kv_heads, value_size = value_pages.shape
    width = tables.shape[1]
    ends = lengths.long()[:, None]
    firsts = torch.zeros_like(ends) if window is None else (ends - window).clamp_min(0)
    seen = width if window is None else min(width, (window - 1) // page + 2)
    logical = firsts // page + torch.arange(seen, device=query.device)
    # entries that lie behind the last page may be anything
    pages = tables.long().gather(1, logical.clamp_max(width - 1)).clamp(0, count - 1)
    offsets = torch.arange(page, device=query.device)
    positions = (logical[:, :, None] * page + offsets).flatten(1)
    visible = (positions >= firsts) & (positions < ends)
    # What is hidden may be NaN, and zero times NaN is NaN.
    hidden = ~visible[:, :, None, None]
    keys = key_pages[pages].flatten(1, 2).masked_fill(hidden, 0).transpose(1, 2)
    values = value_pages[pages].flatten(1, 2).masked_fill(hidden, 0).transpose(1, 2)
    # an empty row looks at one zero value instead of dividing by zero
    visible = visible | ((ends == 0) & (positions == 0))
    grouped = query.reshape(n, kv_heads, heads // kv_heads, key_size)
    mask = visible[:, None, None, :]
    attended = _attend(grouped, keys, values, mask, scale=scale, softcap=softcap)
    return attended.reshape(n, heads, value_size)


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
) -> torch.Tensor:
    """Causal attention of several new tokens per sequence, already written.

    `query` [T, query heads, key size] holds the pieces one after the other; piece `i` is
    `query[starts[i]:starts[i + 1]]`, and `starts[-1]` is T. `lengths[i]` tokens are in the pages
    after it, so its last query is at position `lengths[i] - 1`. `tables` is int32
    [pieces, max_pages]. Returns [T, query heads, value size].
    """
    heads, (kv_heads, value_size) = query.shape[1], value_pages.shape[2:]
    out = query.new_empty((query.shape[0], heads, value_size))
    for row, length in enumerate(lengths):
        piece = slice(starts[row], starts[row + 1])
        position = length - (piece.stop - piece.start)
        first = 0 if window is None else max(0, position - window + 1)
        keys = _span(key_pages, tables[row], first, length)
        values = _span(value_pages, tables[row], first, length)
        # [tokens, heads, size] to [kv heads, group, tokens, size]
        grouped = query[piece].reshape(-1, kv_heads, heads // kv_heads, query.shape[2])
        grouped = grouped.permute(1, 2, 0, 3)
        rows = QUERY_ROWS if softcap is None else min(QUERY_ROWS, SCORES // (heads * len(keys)) + 1)
        for begin in range(0, grouped.shape[2], rows):
            part = grouped[:, :, begin : begin + rows]
            low, high = position + begin, position + begin + part.shape[2]
            oldest = first if window is None else max(first, low - window + 1)
            shown = slice(oldest - first, high - first)
            attended = _attend(
                part,
                _heads_first(keys[shown]).expand(-1, part.shape[1], -1, -1),
                _heads_first(values[shown]).expand(-1, part.shape[1], -1, -1),
                _causal(range(low, high), range(oldest, high), window, query.device),
                scale=scale,
                softcap=softcap,
            )
            at = piece.start + begin
            out[at : at + part.shape[2]] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _span(pages: torch.Tensor, table: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Positions `first .. end - 1` of the sequence of `table` [max_pages]: [tokens, heads, size].

    A view of the pages where that costs no wait for a device; otherwise a copy.
    """
    page = pages.shape[1]
    low, high = first // page, (end - 1) // page
    if low == high and pages.device.type == "cpu":
        kept = pages[int(table[low])]
    else:
        kept = pages.index_select(0, table[low : high + 1]).flatten(0, 1)
    return kept[first - low * page : end - low * page]


def _heads_first(rows: torch.Tensor) -> torch.Tensor:
    """[tokens, kv heads, size] as [kv heads, 1, tokens, size]."""
    return rows.transpose(0, 1)[:, None]


def _causal(
    queries: range, keys: range, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Which of the positions `keys` each of the positions `queries` sees; None if all see all."""
    if len(queries) == 1:
        return None
    at = torch.arange(queries.start, queries.stop, device=device)[:, None]
    of = torch.arange(keys.start, keys.stop, device=device)
    seen = of <= at
    return seen if window is None else seen & (of > at - window)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax attention over tensors [batch, heads, tokens, size]; `mask` is True where seen."""
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2)).mul_(scale / softcap)
    scores = scores.tanh_().mul_(softcap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1), value.float()).to(query.dtype)
