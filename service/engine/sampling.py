"""Logits to the next token, per sequence: on the CPU, with a random source that nobody shares."""

import torch

from service.engine.sequence import SamplingParams
from service.errors import NonFiniteLogits

# Below this a temperature is greedy: dividing by it would leave float32's range.
LOWEST_TEMPERATURE = 1e-6
# Top-p looks among so many tokens first: sorting a whole vocabulary takes 12 ms for every token.
FEW = 1024


class Sampler:
    """Chooses the tokens of one sequence; keeps the state of its random source between steps."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._greedy = params.temperature < LOWEST_TEMPERATURE
        self._random: torch.Generator | None = None
        if not self._greedy:
            self._random = torch.Generator(device="cpu")
            if params.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(params.seed % 2**64)  # any Python int is a seed

    def choose(self, logits: torch.Tensor) -> int:
        """The next token from `logits` (float32 [vocabulary], CPU).

        Raises NonFiniteLogits if any is NaN or infinite: nothing is sampled from garbage.
        """
        check_finite(logits)
        if self._greedy:
            return int(logits.argmax())
        tokens, probabilities = _candidates(logits, self._params)
        return int(tokens[_draw(probabilities, self._random)])


def check_finite(logits: torch.Tensor) -> None:
    """Raise NonFiniteLogits with the count unless all of `logits` are finite."""
    finite = torch.isfinite(logits)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise NonFiniteLogits(
            f"The model produced {bad} NaN or infinite values among {logits.numel()} logits; "
            "nothing was sampled from them."
        )


def _candidates(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that may be drawn, and their probabilities, which need not add up to one."""
    tokens = None
    if 0 < params.top_k < logits.numel():
        logits, tokens = torch.topk(logits, params.top_k)
    # Taking the maximum off first keeps a small temperature from overflowing.
    probabilities = torch.softmax((logits - logits.max()) / params.temperature, dim=-1)
    if params.top_p < 1.0:
        probabilities, places = _nucleus(probabilities, params.top_p)
        tokens = places if tokens is None else tokens[places]
    return torch.arange(logits.numel()) if tokens is None else tokens, probabilities


def _nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest set of the likeliest that reaches `top_p`, largest first, and their places."""
    size = probabilities.numel()
    for count in (min(FEW, size), size):
        largest, places = torch.topk(probabilities, count)
        # A token stays while those before it fall short.
        kept = max(1, int((largest.cumsum(-1) - largest < top_p).sum()))
        if kept < count:
            break
    return largest[:kept], places[:kept]


def _draw(probabilities: torch.Tensor, random: torch.Generator | None) -> int:
    """An index by inverse transform: one random number a token, however large the vocabulary."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    point = torch.rand((), generator=random, dtype=torch.float64) * cumulative[-1]
    # right=True skips tokens of probability zero: their sum equals their predecessor's.
    index = int(torch.searchsorted(cumulative, point, right=True))
    if index == probabilities.numel():  # rounding put the point on the very end
        return int(probabilities.argmax())
    return index
