"""A step of a runner, for tests that have no engine around it."""

from collections.abc import Sequence as Ids

import torch

from service.engine.params import SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Batch
from service.engine.scheduler import Piece
from service.engine.sequence import Sequence
from service.engine.sequence import Stream


def prompt_piece(runner: Runner, ids: Ids[int]) -> Piece:
    """A whole prompt, with memory to run it in."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    sequence = Sequence(0, tuple(ids), params, Stream(len(ids)))
    if not runner.path.memory.admit(sequence):
        raise RuntimeError("the runner has no room for another sequence")
    return Piece(sequence, tuple(ids), 0, samples=True)


def last_logits(runner: Runner, ids: Ids[int]) -> torch.Tensor:
    """Logits of the prompt's last token, [vocabulary], by the path of every request."""
    with torch.inference_mode():
        _, rows = runner.path.logits(Batch((), (prompt_piece(runner, ids),)))
        return rows[0].clone()
