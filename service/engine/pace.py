"""How much of a prompt is computed beside running sequences, so that they do not stall."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.engine.embedding import Way
    from service.engine.runner import Path

# A step that also computes prompts may take so many times a step that only continues sequences.
MOST_SLOWER = 2.5
# Fewest tokens of prompts worth such a step; of a captured one, which is most of all waiting for
# the weights (measured on an H200 with an 8B shape: 9 ms for 64 tokens in all, 13 for 288).
LEAST = 32
LEAST_CAPTURED = 256
# how much of what a new measurement says is believed
NEW = 0.25
# of so few tokens it cannot be told what one takes
FEW = 16


class Pace:
    """Adjusts a number of tokens by how long steps take. Engine thread only; times in seconds.

    step_s: how long a step takes at present.
    """

    def __init__(self, *, least: int, most: int) -> None:
        """least, most: tokens of prompts in a step that also continues sequences."""
        self._least = min(least, most)
        self._most = most
        self._decode_s = 0.0
        self._token_s = 0.0
        self.step_s = 0.0

    @property
    def prefill_tokens(self) -> int:
        """Tokens of prompts that the next step may compute beside running sequences.

        All that fit a step until both are known: how long it takes to continue sequences, and how
        long a token of a prompt takes.
        """
        if not self._decode_s or not self._token_s:
            return self._most
        spare_s = self._decode_s * (MOST_SLOWER - 1)
        return min(max(int(spare_s / self._token_s), self._least), self._most)

    def note(self, decodes: int, prefill_tokens: int, took_s: float) -> None:
        """A step of `decodes` tokens of running sequences and so many of prompts took so long."""
        took_s = max(took_s, 0.0)
        self.step_s = _mean(self.step_s, took_s)
        if not prefill_tokens:
            self._decode_s = _mean(self._decode_s, took_s)
        elif prefill_tokens >= FEW and (not decodes or self._decode_s):
            spent_s = took_s - (self._decode_s if decodes else 0.0)
            self._token_s = _mean(self._token_s, max(spent_s, 0.0) / prefill_tokens)


def least_beside(path: "Path | Way") -> int:
    """Fewest tokens of prompts worth a step that also continues sequences."""
    return LEAST if path.graphs is None else LEAST_CAPTURED


def _mean(before: float, now: float) -> float:
    """A running mean; the first value stands as it is."""
    return before + (now - before) * (NEW if before else 1.0)
