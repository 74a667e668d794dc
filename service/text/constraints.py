"""Grammars that answers must follow: JSON, JSON schemas and tool calls, through llguidance.

A grammar is compiled in the thread of its request, before anything is submitted, so that a schema
that cannot be followed is an error of the request. Every bound here is there because without it a
request of a few bytes could keep a core busy for minutes or fill the memory.
"""

import contextlib
import functools
import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from service.errors import InvalidRequest
from service.errors import Overloaded
from service.errors import UnsupportedParameter

if TYPE_CHECKING:
    import torch
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

MAX_GRAMMAR_CHARACTERS = 65_536
MAX_SCHEMA_DEPTH = 48
# Of all `multipleOf` together: their remainders are states that llguidance makes without asking
# for fuel; 999983 alone takes 25 s and 370 MiB.
MAX_MULTIPLE = 10_000
MAX_CACHED = 32
# A compilation that waits longer for those before it is refused.
WAIT_S = 5.0
# llguidance's own units, each about a fifth of its default. About 4 ms of compiling at most, 15 ms
# for one mask, 20 MiB of lexer states.
LIMITS: Mapping[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Without a bound a small model fills its answer with line ends, which every JSON text allows.
WHITESPACE = r"[ \n\r\t]{0,20}"
ERROR_CHARACTERS = 300
END_OF_THOUGHT = "</think>"
# Of grammars in Lark's notation: their first line, and thoughts with what parts them from the rest.
LARK = "%llguidance {}\n"
THOUGHT = f"thought /{WHITESPACE}/"
THOUGHT_RULES = f"thought[lazy]: /(.|\\n)*/ {json.dumps(END_OF_THOUGHT)}\n"


class TokenConstraint:
    """What one sequence may say next: `service.engine.params.Constraint`. Engine thread only."""

    def __init__(self, matcher: "LLMatcher", vocabulary: int, stop_ids: frozenset[int]) -> None:
        """matcher: at its start, and this sequence's own. vocabulary: of the model's logits."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._stop_ids = stop_ids
        self._stops = np.array(sorted(id_ for id_ in stop_ids if id_ < vocabulary), np.int64)
        self._bits = np.zeros((vocabulary + 31) // 32, np.int32)

    def allowed(self) -> "torch.Tensor":
        """Tokens that may come next, bool [vocabulary]; stop ids exactly if the text may end here.

        Raises InvalidRequest when the grammar became too complex for the text so far.
        """
        import torch

        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise too_complex(self._matcher)
        bits = np.unpackbits(
            self._bits.view(np.uint8), count=self._vocabulary, bitorder="little"
        ).view(np.bool_)
        bits[self._stops] = self._matcher.is_accepting()
        return torch.from_numpy(bits)

    def accept(self, token: int) -> None:
        """Raises InvalidRequest for a token that was not allowed."""
        if token not in self._stop_ids and not self._matcher.consume_token(token):
            raise too_complex(self._matcher)


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar. Any thread may make constraints of it.

    ignored: keywords of its schemas that it leaves out.
    """

    _matcher: "LLMatcher"
    _vocabulary: int
    _own_stops: frozenset[int]
    ignored: tuple[str, ...]

    def constraint(self, stop_ids: frozenset[int] = frozenset()) -> TokenConstraint:
        """For one sequence. stop_ids: what ends it besides the model's own end of sequence."""
        matcher = self._matcher.deep_copy()
        return TokenConstraint(matcher, self._vocabulary, self._own_stops | stop_ids)


class Grammars:
    """Compiles grammars for one model, one at a time, and keeps the last of them."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", vocabulary: int, stop_ids: frozenset[int]
    ) -> None:
        """vocabulary: of the model's logits; may be more or less than the tokenizer's.

        Raises UnsupportedParameter when the model has no fast tokenizer or no end of sequence.
        """
        import llguidance
        import llguidance.hf

        ends = sorted(id_ for id_ in stop_ids if id_ < vocabulary)
        if not getattr(tokenizer, "is_fast", False) or not ends:
            lacks = "fast tokenizer" if ends else "token that ends an answer"
            raise UnsupportedParameter(
                f"this model has no {lacks}, so its answers cannot be made to follow a grammar",
                hint="leave out response_format, and tool_choice or send auto",
            )
        self._vocabulary = vocabulary
        self._stop_ids = frozenset(ends)
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer,
                n_vocab=max(vocabulary, len(tokenizer)),
                eos_token=ends,
            )
        except Exception as error:  # native code on a file of the model's; it says what it likes
            raise UnsupportedParameter(
                "this model's tokenizer cannot be made to follow a grammar"
                f" ({type(error).__name__})",
                hint="leave out response_format, and tool_choice or send auto",
            ) from error
        self._limits = llguidance.LLParserLimits(**LIMITS)
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()
        self._compiling = threading.Lock()

    def compile(self, grammar: str, param: str) -> Grammar:
        """From text in llguidance's form, as `json_grammar` and `service.text.tools` make it.

        param: names the field in errors. Raises InvalidRequest when the grammar is too large, is
        wrong, or allows nothing; Overloaded when others keep the compiler busy.
        """
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise InvalidRequest(
                f"{param} makes a grammar of {len(grammar)} characters; "
                f"{MAX_GRAMMAR_CHARACTERS} are allowed",
                param=param,
            )
        if not self._compiling.acquire(timeout=WAIT_S):
            raise Overloaded("the compiler of grammars is busy, try again", param=param)
        try:
            found = self._compiled.get(grammar)
            if found is None:
                matcher = self._matcher(grammar, param)
                left_out = _ignored(matcher.get_grammar_warnings())
                found = Grammar(matcher, self._vocabulary, self._stop_ids, left_out)
                self._compiled[grammar] = found
                if len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
            else:
                self._compiled.move_to_end(grammar)
        finally:
            self._compiling.release()
        return found

    def _matcher(self, grammar: str, param: str) -> "LLMatcher":
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise InvalidRequest(f"{param} cannot be followed: {_said(matcher)}", param=param)
        # Some faults show at the first mask only; it also warms what its copies share.
        first = TokenConstraint(matcher.deep_copy(), self._vocabulary, self._stop_ids)
        try:
            some = bool(first.allowed().any())
        except InvalidRequest as error:
            raise InvalidRequest(f"{param}: {error}", param=param) from error
        if not some:
            raise InvalidRequest(f"{param} allows no answer at all", param=param)
        return matcher


# Keeps the last models' alive; a server has one, and two while it changes models.
@functools.lru_cache(maxsize=2)
def grammars(
    tokenizer: "PreTrainedTokenizerBase", vocabulary: int, stop_ids: frozenset[int]
) -> Grammars:
    """The same model gives the same object. The first call takes about half a second, and holds
    the interpreter for part of it: see `prepare`. Raises UnsupportedParameter.
    """
    return Grammars(tokenizer, vocabulary, stop_ids)


def prepare(
    tokenizer: "PreTrainedTokenizerBase", vocabulary: int, stop_ids: frozenset[int]
) -> None:
    """Make the first call while a model loads, when it keeps no stream waiting. Takes 20 MiB."""
    with contextlib.suppress(UnsupportedParameter):  # told to those who ask for a grammar
        grammars(tokenizer, vocabulary, stop_ids)


def too_complex(matcher: "LLMatcher") -> InvalidRequest:
    """What a matcher that broke has to say."""
    return InvalidRequest(
        f"the required format became too complex for this answer: {_said(matcher)}",
        hint="use a simpler schema: fewer optional properties, shorter patterns",
    )


def _said(matcher: "LLMatcher") -> str:
    text = matcher.get_error().replace("<non-verbose/>", "")
    if text.startswith("NoExtension"):
        text = "it allows no answer at all"
    return re.sub(r"\s+", " ", text).strip()[:ERROR_CHARACTERS]


# --- JSON


def json_grammar(
    schema: Mapping[str, Any] | None, *, strict: bool, param: str, thinking: bool = False
) -> str:
    """The grammar of JSON texts with a schema (None: of any object).

    strict: a keyword that cannot be followed is an error, when the grammar is compiled. Otherwise
    it is left out, as OpenAI specifies. thinking: the prompt ends inside the model's thoughts,
    which come first then. Raises InvalidRequest when the schema is too large or deep, or has
    settings for llguidance.
    """
    from llguidance import LLMatcher

    wanted: Mapping[str, Any] = {"type": "object"} if schema is None else schema
    check_schema(wanted, param)
    options = {"whitespace_pattern": WHITESPACE, "lenient": not strict, "coerce_one_of": not strict}
    inner = json.dumps({**wanted, "x-guidance": options})
    if thinking:
        return f"{LARK}start: {THOUGHT} %json {inner}\n{THOUGHT_RULES}"
    return LLMatcher.grammar_from_json_schema(inner)


def check_schema(schema: Mapping[str, Any], param: str) -> None:
    """Raise InvalidRequest for a schema that would cost too much to look at."""
    multiples: list[int] = []
    for count, (depth, key, value) in enumerate(_walk(schema)):
        if count > MAX_GRAMMAR_CHARACTERS:  # before it is written to see how long it is
            raise InvalidRequest(
                f"{param} has more than {MAX_GRAMMAR_CHARACTERS} characters", param=param
            )
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidRequest(
                f"{param} is nested deeper than {MAX_SCHEMA_DEPTH} levels", param=param
            )
        if key == "x-guidance":
            raise InvalidRequest(f"{param} has x-guidance, which is not done here", param=param)
        if key == "multipleOf" and isinstance(value, int | float):
            multiples.append(abs(Fraction(str(value + 0)).numerator))
    size = len(json.dumps(schema))
    if size > MAX_GRAMMAR_CHARACTERS:
        raise InvalidRequest(
            f"{param} has {size} characters; {MAX_GRAMMAR_CHARACTERS} are allowed", param=param
        )
    if max(math.lcm(*multiples), sum(multiples)) > MAX_MULTIPLE:
        raise InvalidRequest(
            f"{param}: the multipleOf of all parts together may not be above {MAX_MULTIPLE}",
            param=param,
        )


def _walk(schema: Any) -> Iterator[tuple[int, str, Any]]:
    """Every key of every object with its depth and value. Without recursion."""
    waiting: list[tuple[int, Any]] = [(1, schema)]
    while waiting:
        depth, item = waiting.pop()
        if isinstance(item, Mapping):
            for key, value in item.items():
                yield depth, key, value
                waiting.append((depth + 1, value))
        elif isinstance(item, list):
            if item:
                yield depth, "", None
            waiting += [(depth + 1, value) for value in item]


def _ignored(warnings: Sequence[str]) -> tuple[str, ...]:
    """Keywords that a lenient grammar leaves out, from what llguidance says of it."""
    found = [re.findall(r'"([A-Za-z$]+)"', text) for text in warnings if "Unimplemented" in text]
    return tuple(dict.fromkeys(name for names in found for name in names))
