"""Scores to tokens on any device: batched, without a sort of the vocabulary, without a sync.

Everything is defined by values, never by the order a sort left equals in, so that a row gives the
same token on every device and in every batch, but for rounding: the exponentials and sums of the
devices differ in their last bits.
"""

import numpy as np
import torch

# A draw looks at the sums of so many neighbours first, then inside one block: both looks are short,
# and the running sums can be float64 at no cost.
BLOCK = 512


def padded(vocabulary: int) -> int:
    """Columns of a score matrix: whole blocks, and at least one column that is no token."""
    return (vocabulary // BLOCK + 1) * BLOCK


def scores(logits: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """A float32 copy [rows, padded(vocabulary)] of `logits` [n, vocabulary]; -inf in the padding.

    rows: int64 on the logits' device, or None for all.
    """
    count, vocabulary = logits.shape
    picked = logits if rows is None else logits.index_select(0, rows)
    copy = torch.empty(
        (count if rows is None else rows.numel(), padded(vocabulary)),
        dtype=torch.float32,
        device=logits.device,
    )
    copy[:, :vocabulary] = picked
    copy[:, vocabulary:] = -torch.inf
    return copy


def to_weights(scores: torch.Tensor, temperature: torch.Tensor) -> None:
    """In place: what each token's probability is proportional to; the likeliest has 1.

    scores: float32 [n, width]. temperature: [n], not 0. Taking the maximum off first keeps a small
    temperature from overflowing. A row of nothing but -inf becomes NaN.
    """
    scores.sub_(scores.amax(-1, keepdim=True)).div_(temperature.float()[:, None]).exp_()


def mass(weights: torch.Tensor) -> torch.Tensor:
    """Sum of each row, float64 [n]. weights: float32 [n, whole blocks], contiguous."""
    return _blocks(weights).sum(-1).sum(-1, dtype=torch.float64)


def least(
    weights: torch.Tensor,
    total: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    look: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest weight that may be drawn, float32 [n], and whether it is known, bool [n].

    weights: float32 [n, width], the likeliest of each row 1. total: their `mass`. top_k, top_p,
    min_p: float64 [n]; 0, 1 and 0 are off; top_p counts within what top_k left. look: how many of
    the largest to look at; where that was too few the weight is not known and comes as 0. With
    `look` as wide as the weights it always is.
    """
    values = _largest(weights, look)
    exact = values.double()
    sums = exact.cumsum(-1)
    limited = top_k > 0
    place = torch.where(limited, top_k, float(look)).clamp(max=look).long()
    total = torch.where(limited, sums.gather(1, place[:, None] - 1)[:, 0], total)
    wanted = torch.where(top_p < 1.0, top_p * total, torch.inf)
    # A token stays while those before it fall short.
    kept = (sums - exact < wanted[:, None]) & (values >= min_p[:, None])
    kept &= torch.arange(look, device=weights.device) < place[:, None]
    last = kept.sum(-1).clamp(min=1) - 1
    reached = (sums[:, -1] >= wanted) | (values[:, -1] < min_p)
    known = torch.where(limited, top_k <= look, reached)
    if look >= weights.shape[1]:
        known = torch.ones_like(known)
    return values.gather(1, last[:, None])[:, 0] * known, known


def forbid_below(weights: torch.Tensor, least: torch.Tensor) -> None:
    """In place: weights [n, width] below least [n] become 0. Equals of the least stay, all."""
    weights.mul_(weights >= least[:, None])


def draw(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """One token of each row by inverse transform, int64 [n]; never one of weight 0.

    weights: float32 [n, whole blocks], contiguous. points: uniform in [0, 1), float64 [n].
    """
    blocks = _blocks(weights)
    sums = blocks.sum(-1).double()
    block, left = _find(sums, points * sums.sum(-1))
    inside = blocks[torch.arange(len(blocks), device=weights.device), block].double()
    place, _ = _find(inside, left)
    return block * BLOCK + place


def _find(weights: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index at which the running sum passes the point, and how far into it the point lies.

    weights: float64 [n, m]. points: float64 [n].
    """
    sums = weights.cumsum(-1)
    possible = weights > 0
    # Parallel sums may step up at a weight of 0 by their rounding, so both are asked.
    passed = possible & (sums > points[:, None])
    first = passed.byte().argmax(-1)
    # Rounding may put the point on the very end: then it is the last that can be.
    last = weights.shape[1] - 1 - possible.flip(-1).byte().argmax(-1)
    index = torch.where(passed.any(-1), first, last)
    before = (sums - weights).gather(1, index[:, None])[:, 0]
    return index, (points - before).clamp(min=0)


def _largest(weights: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest of each row, descending, float32 [n, count]."""
    width = weights.shape[1]
    if weights.device.type == "cpu":
        # numpy's partition is six times faster than torch's topk, its sort twenty times.
        values = weights.numpy()
        if count < width:
            values = np.partition(values, width - count, axis=-1)[:, width - count :]
        return torch.from_numpy(np.ascontiguousarray(np.sort(values, axis=-1)[:, ::-1]))
    if count < width:
        return weights.topk(count, dim=-1).values
    return weights.sort(dim=-1, descending=True).values


def _blocks(weights: torch.Tensor) -> torch.Tensor:
    return weights.view(len(weights), -1, BLOCK)
