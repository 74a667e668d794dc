"""What requests do to the scores before anything is drawn: constraint, bias, penalties."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from service.engine.state import State
from service.errors import RequestError
from service.errors import StepFailed
from service.placement.inputs import send


def edit(scores: torch.Tensor, vocabulary: int, states: Sequence[State]) -> dict[int, RequestError]:
    """Change the scores in place; returns the errors of rows whose constraint broke.

    scores: float32 [n, more than vocabulary], row i of states[i]. Does not wait for the device.
    """
    errors: dict[int, RequestError] = {}
    masks = []
    for row, state in enumerate(states):
        try:
            mask = _mask(state, vocabulary)
        except Exception as error:  # a constraint is not the engine's code, and one row's only
            errors[row] = broken(error)
        else:
            if mask is not None:
                masks.append((row, mask))
    if masks:
        rows = upload([row for row, _ in masks], np.int64, scores.device)
        forbidden = ~send(torch.stack([mask for _, mask in masks]), scores.device)
        real = scores[:, :vocabulary]
        real[rows] = real[rows].masked_fill(forbidden, -torch.inf)
    _bias(scores, vocabulary, states)
    _penalise(scores, vocabulary, states)
    return errors


def broken(error: Exception) -> RequestError:
    """The error with which a sequence fails whose constraint raised this one."""
    if isinstance(error, RequestError):
        return error
    return StepFailed(f"The constraint of this request raised {type(error).__name__}: {error}")


def upload(values: Any, dtype: Any, device: torch.device) -> torch.Tensor:
    """A small array of the host, on its way to the device."""
    return send(torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)), device)


def _mask(state: State, vocabulary: int) -> torch.Tensor | None:
    if state.params.constraint is None:
        return None
    mask = state.params.constraint.allowed()
    if mask is None or (mask.dtype == torch.bool and mask.shape == (vocabulary,)):
        return mask
    raise StepFailed(
        f"The constraint gave a mask of {mask.dtype} {tuple(mask.shape)}; this model needs"
        f" torch.bool ({vocabulary},)."
    )


def _bias(scores: torch.Tensor, vocabulary: int, states: Sequence[State]) -> None:
    found = [(row, *state.biases()) for row, state in enumerate(states)]
    found = [each for each in found if len(each[1])]
    if not found:
        return
    lengths = [len(tokens) for _, tokens, _ in found]
    rows = upload(np.repeat([row for row, _, _ in found], lengths), np.int64, scores.device)
    tokens = upload(np.concatenate([each for _, each, _ in found]), np.int64, scores.device)
    values = upload(np.concatenate([each for _, _, each in found]), np.float32, scores.device)
    _change(scores, vocabulary, rows, tokens, lambda old: old + values)


def _penalise(scores: torch.Tensor, vocabulary: int, states: Sequence[State]) -> None:
    device = scores.device
    penalised = [(row, state) for row, state in enumerate(states) if state.tokens]
    if not penalised:
        return
    lengths = [len(state.tokens) for _, state in penalised]
    settings = [
        (row, p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
        for row, p in ((row, state.params) for row, state in penalised)
    ]
    tokens = upload(np.concatenate([state.tokens for _, state in penalised]), np.int32, device)
    counts = upload(np.concatenate([state.counts for _, state in penalised]), np.int32, device)
    # Spread over the tokens on the device: what crosses to it is a third of that.
    rows, repetition, frequency, presence = upload(
        np.array(settings).T, np.float64, device
    ).repeat_interleave(upload(lengths, np.int64, device), dim=1, output_size=sum(lengths))
    taken = (frequency * counts + presence * (counts > 0)).float()
    factor = repetition.float()

    def penalties(old: torch.Tensor) -> torch.Tensor:
        repeated = torch.where(old > 0, old / factor, old * factor)
        changed: torch.Tensor = repeated - taken
        return changed

    _change(scores, vocabulary, rows.long(), tokens.long(), penalties)


def _change(
    scores: torch.Tensor,
    vocabulary: int,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """In place: the scores at (rows, tokens), each pair once, become `change` of them."""
    # A stop id or a token of the prompt may have no logit; the padding takes what it would get.
    index = (rows, tokens.clamp(max=vocabulary))
    scores.index_put_(index, change(scores[index]))
