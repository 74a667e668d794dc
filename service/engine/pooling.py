"""From the hidden states of a text's tokens to one embedding. Padded rows, any device."""

import torch

from service.models.sentence_files import Pooling


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One row for each text, float32 [texts, size].

    states: [texts, tokens, size]. mask: int64 [texts, tokens], 1 for a text's own tokens, which
    come first, and 0 for padding; on the device of states.
    """
    if pooling == "cls":
        return states[:, 0].float()
    if pooling == "last":
        rows = torch.arange(len(states), device=states.device)
        return states[rows, mask.sum(1) - 1].float()
    padding = (mask == 0).unsqueeze(-1)
    if pooling == "max":
        return states.float().masked_fill(padding, -torch.inf).amax(1)
    return states.float().masked_fill(padding, 0.0).sum(1) / mask.sum(1, keepdim=True)


def scaled(rows: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, [texts, size]."""
    return torch.nn.functional.normalize(rows, dim=1)
