"""Logprobs of a prompt's own tokens: each from the logits of the token before it.

A path keeps those rows beside the ones it samples from and hands them over here. Scores are noted
by position, so a step that runs again, or a prompt that is computed again, changes nothing.
"""

from collections.abc import Sequence as List

import torch

from service.engine.choosing import Chosen
from service.engine.choosing import report
from service.engine.scheduler import Piece
from service.errors import NonFiniteLogits
from service.placement import kv


def wanted(piece: Piece) -> range:
    """Positions of the piece whose logits score the next token of the prompt, if not done yet."""
    sequence = piece.sequence
    if sequence.params.prompt_logprobs is None:
        return range(0)
    done = len(sequence.stream.prompt_logprobs)
    return range(max(piece.start, done), min(piece.stop, len(sequence.prompt) - 1))


def score(pieces: List[Piece], rows: torch.Tensor) -> None:
    """Put the scores on the pieces' streams.

    rows: float logits of what is `wanted` of each piece, one after the other, [n, vocabulary].
    Raises NonFiniteLogits.
    """
    first = 0
    for piece in pieces:
        count = len(wanted(piece))
        if count:
            _score(piece, rows[first : first + count])
        first += count


def _score(piece: Piece, rows: torch.Tensor) -> None:
    tokens = [piece.sequence.prompt[position + 1] for position in wanted(piece)]
    most = piece.sequence.params.prompt_logprobs or 0
    found: list[list[float]] = []
    # a few rows at a time: float32 copies of all would be memory that no plan counts
    for start in range(0, len(rows), kv.SCORE_ROWS):
        some = rows[start : start + kv.SCORE_ROWS]
        theirs = torch.tensor(tokens[start : start + len(some)], device=rows.device)
        part = report(some, range(len(some)), most, theirs)
        if not part.isfinite().all():
            raise NonFiniteLogits("The model produced NaN or infinite values for the prompt.")
        found += part.tolist()
    for token, values in zip(tokens, found, strict=True):
        top = zip(map(int, values[1 + most :]), values[1 : 1 + most], strict=True)
        piece.sequence.stream.prompt_logprobs.append(Chosen(token, values[0], tuple(top)))
