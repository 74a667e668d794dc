"""What one sequence remembers between its tokens, and what it needs for the next."""

import secrets
from array import array
from collections.abc import Iterable
from enum import IntEnum
from hashlib import blake2b

import numpy as np

from service.engine.params import SamplingParams

# Beyond this a temperature makes no difference, and float32 ends.
HIGHEST_TEMPERATURE = 1e30


class Kind(IntEnum):
    """What a row needs beyond the argmax of its raw logits. Rows lie in this order."""

    NOTHING = 0
    EDITED = 1  # another argmax, after bias, penalties, constraint
    DRAWN = 2  # from all tokens
    CUT = 3  # from all that reach a known share of the likeliest: min-p
    LIMITED = 4  # from what top-k and top-p leave


class State:
    """What one sequence remembers between its tokens: how many there were, and which.

    It outlives a preemption: nothing in it is computed again.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int] = (), choice: int = 0) -> None:
        """prompt: its token ids. choice: tells the answers to one request with a seed apart."""
        self.params = params
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self._key = blake2b(f"{seed} {choice}".encode(), digest_size=32).digest()
        self._answered = 0
        # Distinct tokens with how often each is in the answer; 0 if only in the prompt.
        self.tokens = array("i")
        self.counts = array("i")
        self._places: dict[int, int] = {}
        self._penalised = params.penalised
        if params.repetition_penalty != 1.0:
            for token in dict.fromkeys(prompt):
                self._add(token, 0)
        self._biases: tuple[np.ndarray, np.ndarray] | None = None
        self._suppressing = bool(params.stop_ids) and params.min_tokens > 0
        self._edited = self._penalised or bool(params.logit_bias) or params.constraint is not None
        self._greedy = params.greedy
        self._plain = self._greedy and not self._edited and params.logprobs is None

    @property
    def plain(self) -> bool:
        """Whether its next token is the argmax of its logits, and nothing else is asked for."""
        return self._plain and not self._suppressing

    def accept(self, token: int) -> None:
        """This token is the next of the answer: `Pending.collect` calls it.

        Raises whatever the constraint raises.
        """
        self._answered += 1
        if self._suppressing and self._answered >= self.params.min_tokens:
            self._suppressing = False
            self._biases = None
        if self._penalised:
            self._add(token, 1)
        if self.params.constraint is not None:
            self.params.constraint.accept(token)

    def _add(self, token: int, times: int) -> None:
        place = self._places.setdefault(token, len(self.tokens))
        if place == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(times)
        else:
            self.counts[place] += times

    def kind(self, vocabulary: int) -> Kind:
        if self._greedy:
            return Kind.EDITED if self._edited or self._suppressing else Kind.NOTHING
        if self.params.top_p < 1.0 or 0 < self.params.top_k < vocabulary:
            return Kind.LIMITED
        return Kind.CUT if self.params.min_p > 0.0 else Kind.DRAWN

    def numbers(self) -> tuple[float, ...]:
        """Temperature, top_k, top_p, min_p and the random number of the next token."""
        p = self.params
        temperature = 1.0 if self._greedy else min(p.temperature, HIGHEST_TEMPERATURE)
        return temperature, p.top_k, p.top_p, p.min_p, self._random()

    def _random(self) -> float:
        """Uniform in [0, 1) with 53 random bits."""
        count = self._answered.to_bytes(8, "little")
        bits = blake2b(count, key=self._key, digest_size=8).digest()
        return (int.from_bytes(bits, "little") >> 11) * 2.0**-53

    def biases(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int64, each once, and what is added to their logits, float32."""
        if self._biases is None:
            added = dict(self.params.logit_bias)
            if self._suppressing:  # whatever their bias
                added |= dict.fromkeys(self.params.stop_ids, -np.inf)
            tokens = np.fromiter(added.keys(), np.int64, len(added))
            self._biases = tokens, np.fromiter(added.values(), np.float32, len(added))
        return self._biases
