"""Sequences without a client, for tests of the scheduler and of its memory."""

import itertools
from collections.abc import Iterable

from service.engine.params import SamplingParams
from service.engine.scheduler import Memory
from service.engine.sequence import Sequence
from service.engine.sequence import Stream

STOP = 9999

_ids = itertools.count()


def sequence(
    prompt: Iterable[int] | int = 1,
    *,
    number: int | None = None,
    max_tokens: int = 4,
    deadline: float | None = None,
    owner: str = "",
    leader: Sequence | None = None,
    prompt_logprobs: int | None = None,
) -> Sequence:
    """prompt: its tokens, or how many."""
    ids = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        stop_ids=frozenset({STOP}),
        prompt_logprobs=prompt_logprobs,
    )
    number = next(_ids) if number is None else number
    return Sequence(number, ids, params, Stream(len(ids)), deadline, owner, leader)


def compute(memory: Memory, one: Sequence, tokens: int | None = None) -> None:
    """What the engine does after a step: `tokens` of it are computed, or all that are known."""
    one.computed = one.known if tokens is None else tokens
    memory.computed(one)


def finished(memory: Memory, one: Sequence) -> None:
    """Admit, compute and free a sequence."""
    assert memory.admit(one)
    compute(memory, one)
    memory.free(one)
