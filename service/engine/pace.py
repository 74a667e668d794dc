"""How much of a prompt is computed beside running sequences, so that they do not stall.

A step takes what it takes to continue sequences, plus, if it has a piece of a prompt, a fixed time
(captured steps cannot be used) and a time for every token of the piece. All three are measured.
"""

# A step that also computes prompts may take so many times a step that only continues sequences, or
# twice the fixed time of such a step where that is more: fewer tokens would hardly be faster.
MOST_SLOWER = 2.5
# how much of what a new measurement says is believed
NEW = 0.25
# A first step is slow, and so is a small one for its tokens: a better time is believed at once.
WORSE = 0.05


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
        self._fixed_s = 0.0
        self.step_s = 0.0

    @property
    def prefill_tokens(self) -> int:
        """Tokens of prompts that the next step may compute beside running sequences.

        All that fit a step until both are known: how long it takes to continue sequences, and how
        long a token of a prompt takes.
        """
        if not self._decode_s or not self._token_s:
            return self._most
        spare_s = max(self._decode_s * (MOST_SLOWER - 1) - self._fixed_s, self._fixed_s)
        return min(max(int(spare_s / self._token_s), self._least), self._most)

    def note(self, decodes: int, prefill_tokens: int, took_s: float) -> None:
        """A step of `decodes` tokens of running sequences and so many of prompts took so long."""
        took_s = max(took_s, 0.0)
        self.step_s = _mean(self.step_s, took_s, NEW)
        if not prefill_tokens:
            self._decode_s = _mean(self._decode_s, took_s, NEW)
        elif not decodes:
            now = took_s / prefill_tokens
            self._token_s = _mean(self._token_s, now, 1.0 if now < self._token_s else WORSE)
        elif self._decode_s:
            beside_s = max(took_s - self._decode_s, 0.0)
            now = beside_s / prefill_tokens
            self._token_s = min(self._token_s or now, now or self._token_s)
            self._fixed_s = _mean(self._fixed_s, beside_s - self._token_s * prefill_tokens, NEW)


def _mean(before: float, now: float, believed: float) -> float:
    """A running mean; the first value stands as it is."""
    return before + (now - before) * (believed if before else 1.0)
