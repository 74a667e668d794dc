"""How the tokens of one sequence are chosen: the parameters, and the hook for constrained decoding.

Which request fields they come from; of `OpenAI` the official API, of `vLLM` the extensions that
clients of local servers send:

| parameter          | chat completions                       | completions  | of     |
| ------------------ | -------------------------------------- | ------------ | ------ |
| max_tokens         | max_completion_tokens, max_tokens      | max_tokens   | OpenAI |
| temperature        | temperature                            | the same     | OpenAI |
| top_p              | top_p                                  | the same     | OpenAI |
| presence_penalty   | presence_penalty                       | the same     | OpenAI |
| frequency_penalty  | frequency_penalty                      | the same     | OpenAI |
| logit_bias         | logit_bias (object: id as text, bias)  | the same     | OpenAI |
| seed               | seed                                   | the same     | OpenAI |
| logprobs           | logprobs: true is 0, with top_logprobs | logprobs: k  | OpenAI |
|                    | k is k; false or absent is None        |              |        |
| prompt_logprobs    |                                        | logprobs: k  | OpenAI |
|                    |                                        | with echo    |        |
| constraint         | response_format, tools, tool_choice    |              | OpenAI |
| top_k              | top_k                                  | the same     | vLLM   |
| min_p              | min_p                                  | the same     | vLLM   |
| repetition_penalty | repetition_penalty                     | the same     | vLLM   |
| min_tokens         | min_tokens                             | the same     | vLLM   |
| stop_ids           | stop_token_ids, and the model's own    | the same     | vLLM   |
|                    | unless ignore_eos                      |              |        |

`n` and `best_of` are several sequences, not a parameter of one. `stop` is text and is looked for
behind the engine.
"""

import math
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Protocol

from service.errors import ContextTooLong
from service.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

# Below this a temperature is greedy: dividing by it would leave float32's range.
LOWEST_TEMPERATURE = 1e-6
# OpenAI's bounds.
LARGEST_BIAS = 100.0
LARGEST_PENALTY = 2.0
MOST_LOGPROBS = 20
# Ours: beyond these logits leave float32's range.
REPETITION_BOUNDS = (0.01, 100.0)


class Constraint(Protocol):
    """What may follow, for constrained decoding. Belongs to one sequence; engine thread only."""

    def allowed(self) -> "torch.Tensor | None":
        """Tokens that may come next: bool [vocabulary] on the CPU, or None if all may.

        Called once before each token. The tensor may be used again after the next `accept`.
        """

    def accept(self, token: int) -> None:
        """This token was chosen. Called with the token that ends the answer as well."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens of one sequence are chosen. Values are checked before they get here: `check`.

    max_tokens: of the answer. temperature: 0 is greedy. top_k: 0 is off. top_p: 1.0 is off. seed:
    with it the result does not depend on what runs beside the sequence. stop_ids: end the sequence
    and are not delivered. min_p: tokens below this share of the likeliest's probability are not
    drawn. repetition_penalty: 1.0 is off. logit_bias: (id, what is added to its logit); each id
    once. min_tokens: no stop id is chosen before so many tokens. logprobs: None is off, 0 the
    chosen token's, k those of the k likeliest as well. prompt_logprobs: the same for every token of
    the prompt but the first; then max_tokens may be 0. pooled: no token is chosen, the prompt's
    embedding is wanted; then max_tokens is 0. service/engine/choosing.py says in which order they
    act and what each of them counts.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    pooled: bool = False
    constraint: Constraint | None = field(default=None, compare=False)

    @property
    def greedy(self) -> bool:
        """Whether no random number can change which token is chosen."""
        return self.temperature < LOWEST_TEMPERATURE or self.top_k == 1 or self.top_p <= 0.0

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        penalties = (self.presence_penalty, self.frequency_penalty)
        return self.repetition_penalty != 1.0 or penalties != (0.0, 0.0)


def check(params: SamplingParams, vocabulary: int) -> None:
    """Raise InvalidRequest, with `param`, for a value that cannot be sampled with.

    vocabulary: token ids are below it. That max_tokens fits the context is not looked at.
    """
    p = params
    _within("temperature", p.temperature, 0.0, math.inf)
    _within("top_k", p.top_k, 0, math.inf)
    _within("top_p", p.top_p, 0.0, 1.0)
    _within("min_p", p.min_p, 0.0, 1.0)
    _within("repetition_penalty", p.repetition_penalty, *REPETITION_BOUNDS)
    _within("presence_penalty", p.presence_penalty, -LARGEST_PENALTY, LARGEST_PENALTY)
    _within("frequency_penalty", p.frequency_penalty, -LARGEST_PENALTY, LARGEST_PENALTY)
    _within("min_tokens", p.min_tokens, 0, p.max_tokens)
    for count in (p.logprobs, p.prompt_logprobs):
        if count is not None:
            _within("logprobs", count, 0, min(MOST_LOGPROBS, vocabulary))
    for token, bias in p.logit_bias:
        _within(f"logit_bias[{token}]", bias, -LARGEST_BIAS, LARGEST_BIAS, param="logit_bias")
    _known("logit_bias", [token for token, _ in p.logit_bias], vocabulary)


def check_prompt(
    prompt: Sequence[int], params: SamplingParams, *, vocabulary: int, capacity: int
) -> None:
    """Raise InvalidRequest or ContextTooLong for what the model cannot be asked to continue.

    capacity: tokens of prompt and answer together.
    """
    if not prompt:
        raise InvalidRequest("The prompt is empty; give at least one token.", param="prompt")
    least = 1 if params.prompt_logprobs is None and not params.pooled else 0
    if params.max_tokens < least:
        raise InvalidRequest(
            f"max_tokens is {params.max_tokens}; give {least} or more.", param="max_tokens"
        )
    check(params, vocabulary)
    total = len(prompt) + params.max_tokens
    if total > capacity:
        raise ContextTooLong(
            f"This model's maximum context length is {capacity} tokens. However, you requested "
            f"{total} tokens ({len(prompt)} in the prompt, {params.max_tokens} in the "
            "completion). Please reduce the length of the prompt or completion."
        )
    for position, token in enumerate(prompt):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise InvalidRequest(
                f"Token {token!r} at position {position} of the prompt is not one of this "
                f"model's ids, which are whole numbers from 0 to {vocabulary - 1}.",
                param="prompt",
            )


def _within(
    name: str, value: float, lowest: float, highest: float, *, param: str | None = None
) -> None:
    if not (lowest <= value <= highest and math.isfinite(value)):
        bounds = f"from {lowest:g} to {highest:g}" if highest < math.inf else f"{lowest:g} or more"
        raise InvalidRequest(f"{name} is {value}; give {bounds}", param=param or name)


def _known(name: str, tokens: Iterable[int], vocabulary: int) -> None:
    seen: set[int] = set()
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise InvalidRequest(
                f"{name} has token {token}; this model's ids are 0 to {vocabulary - 1}", param=name
            )
        if token in seen:
            raise InvalidRequest(f"{name} has token {token} twice; give it once", param=name)
        seen.add(token)
