"""Grammars let through what they should, say no to what costs too much, and end where they end."""

import json
import random
import threading
import time
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.errors import Overloaded
from service.errors import UnsupportedParameter
from service.text import constraints
from service.text.constraints import Grammar
from service.text.constraints import Grammars
from service.text.constraints import TokenConstraint
from service.text.constraints import json_grammar
from tests.support.tiny import IM_END
from tests.support.tiny import IM_START
from tests.support.tiny import VOCAB
from tests.support.tiny import tiny_tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PADDED = VOCAB + 30


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tiny_tokenizer(), PADDED, frozenset({IM_END}))


def compiled(grammars: Grammars, schema: dict[str, Any] | None, *, strict: bool = True) -> Grammar:
    return grammars.compile(json_grammar(schema, strict=strict, param="f"), "f")


def say(constraint: TokenConstraint, text: str) -> int:
    """How many bytes of the text are let through."""
    for at, byte in enumerate(text.encode()):
        if not constraint.allowed()[byte]:
            return at
        constraint.accept(byte)
    return len(text.encode())


def draw(constraint: TokenConstraint, seed: int, most: int = 2000) -> str | None:
    """A random answer, the end as soon as it is allowed; None if it was cut off."""
    chance = random.Random(seed)
    found: list[int] = []
    while len(found) < most:
        mask = constraint.allowed()
        if mask[IM_END]:
            constraint.accept(IM_END)
            return bytes(found).decode()
        # printable characters, so that strings end now and then
        choices = [t for t in mask.nonzero().flatten().tolist() if 32 <= t < 127]
        quote = 34 in choices and chance.random() < 0.2
        found.append(34 if quote else chance.choice(choices))
        constraint.accept(found[-1])
    return None


def test_the_mask_is_a_plain_bool_of_the_models_vocabulary(grammars):
    mask = compiled(grammars, PERSON).constraint().allowed()
    assert mask.dtype == torch.bool
    assert mask.shape == (PADDED,)
    assert mask[ord("{")]
    assert not mask[VOCAB:].any()
    assert not mask[IM_START]


def test_a_model_with_fewer_logits_than_its_tokenizer_has_tokens():
    small = Grammars(tiny_tokenizer(), IM_END, frozenset({IM_START, IM_END}))
    mask = compiled(small, PERSON).constraint().allowed()
    assert mask.shape == (IM_END,)


def test_the_end_is_allowed_exactly_when_the_text_is_complete(grammars):
    constraint = compiled(grammars, PERSON).constraint(frozenset({ord("#")}))
    for byte in b'{"name": "Ann#a", "age": 7':
        mask = constraint.allowed()
        assert not mask[IM_END]
        # an id that ends the sequence cannot be part of the text
        assert not mask[ord("#")]
        if byte != ord("#"):
            assert mask[byte]
            constraint.accept(byte)
    constraint.accept(ord("}"))
    mask = constraint.allowed()
    assert mask[IM_END]
    assert mask[ord("#")]
    constraint.accept(IM_END)


def test_a_wrong_token_is_an_error_and_not_a_surprise_later(grammars):
    constraint = compiled(grammars, PERSON).constraint()
    constraint.allowed()
    with pytest.raises(InvalidRequest):
        constraint.accept(ord("x"))


def test_two_sequences_of_one_grammar_do_not_disturb_each_other(grammars):
    grammar = compiled(grammars, PERSON)
    first, second = grammar.constraint(), grammar.constraint()
    assert say(first, '{"name": "A') == 11
    assert say(second, '{"name": "B", "age": 1}') == 23
    assert say(first, '", "age": 2}') == 12
    assert first.allowed()[IM_END]
    assert second.allowed()[IM_END]


@pytest.mark.parametrize(
    "schema",
    [
        PERSON,
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        {"anyOf": [{"const": "yes"}, {"enum": [1, 2.5, None]}]},
        {
            "$ref": "#/$defs/node",
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "value": {"type": "string", "pattern": "^[a-z]{1,3}$"},
                        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                    },
                    "required": ["value", "next"],
                    "additionalProperties": False,
                }
            },
        },
    ],
)
def test_what_random_choices_make_is_json(grammars, schema):
    complete = 0
    for seed in range(8):
        text = draw(compiled(grammars, schema).constraint(), seed)
        if text is not None:
            json.loads(text)
            complete += 1
    assert complete > 0


def test_any_object_is_what_json_object_asks_for(grammars):
    grammar = compiled(grammars, None)
    assert say(grammar.constraint(), '{"a": [1, {"b": null}]}') == 23
    assert say(grammar.constraint(), "[1]") == 0


def test_white_space_has_an_end(grammars):
    assert say(compiled(grammars, PERSON).constraint(), "{" + "\n" * 50) < 30


def test_thoughts_come_before_the_json_when_the_prompt_began_them(grammars):
    text = json_grammar(PERSON, strict=True, thinking=True, param="f")
    constraint = grammars.compile(text, "f").constraint()
    thoughts = 'well {"a"}, hm</think>\n\n'
    assert say(constraint, thoughts) == len(thoughts)
    assert say(constraint, "no") == 0
    assert say(constraint, '{"name": "A", "age": 1}') == 23
    assert constraint.allowed()[IM_END]


def test_the_same_grammar_is_compiled_once_and_the_oldest_forgotten(grammars):
    assert compiled(grammars, PERSON) is compiled(grammars, PERSON)
    first = compiled(grammars, {"const": "first"})
    for at in range(constraints.MAX_CACHED):
        compiled(grammars, {"const": at})
    assert compiled(grammars, {"const": "first"}) is not first


def test_keywords_that_cannot_be_followed_are_refused_or_named(grammars):
    schema = {"type": "array", "uniqueItems": True}
    with pytest.raises(InvalidRequest, match="uniqueItems") as caught:
        compiled(grammars, schema)
    assert caught.value.param == "f"
    assert compiled(grammars, schema, strict=False).ignored == ("uniqueItems",)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": 5},
        {"type": "string", "pattern": "(a"},
        {"type": "string", "pattern": "^(?=a)b$"},
        {"type": "string", "minLength": 5, "maxLength": 2},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "http://example.invalid/schema"},
        {"$ref": "file:///etc/passwd"},
        {"x-guidance": {"lenient": True}},
        {"properties": {"a": {"x-guidance": {}}}},
    ],
)
def test_a_wrong_schema_is_named_and_fetches_nothing(grammars, schema):
    with pytest.raises(InvalidRequest) as caught:
        compiled(grammars, schema)
    assert caught.value.param == "f"


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 999_983},
        {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (101, 103, 107)]},
        nested(60),
        {"enum": ["x" * 100 + str(at) for at in range(1000)]},
        {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(2000)}},
    ],
    ids=["multiple", "multiples", "deep", "large", "optional"],
)
def test_a_schema_that_costs_too_much_is_refused_or_ends_its_own_answer(grammars, schema):
    with pytest.raises(InvalidRequest):  # noqa: PT012 - at once, or at some token of the answer
        constraint = compiled(grammars, schema).constraint()
        say(constraint, '{"p1": "x"}')
        raise AssertionError("nothing was too much")


def doubling(keyword: str) -> dict[str, Any]:
    """Forty definitions, each of which has the next one twice."""
    links = {
        f"d{at}": {keyword: [{"$ref": f"#/$defs/d{at + 1}"}, {"$ref": f"#/$defs/d{at + 1}"}]}
        for at in range(40)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**links, "d40": {"type": "string"}}}


BOMBS: dict[str, dict[str, Any]] = {
    "nested quantifiers": {
        "type": "string",
        "pattern": "^((((a{1,30}){1,30}){1,30}){1,30}){1,30}$",
    },
    "catastrophic for backtracking": {"type": "string", "pattern": "^(((a+)+)+)+$"},
    "huge count": {"type": "string", "pattern": "^a{1000000,2000000}$"},
    "huge count of a large class": {"type": "string", "pattern": "^[\\p{L}\\p{N}]{60000}$"},
    "exponential automaton": {"type": "string", "pattern": "(a|b)*a(a|b){25}"},
    "circle of references": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "doubling allOf": doubling("allOf"),
    "doubling anyOf": doubling("anyOf"),
    "a hundred thousand branches": {"anyOf": [{"const": at} for at in range(100_000)]},
    "product of branches": {
        "allOf": [{"anyOf": [{"required": [f"k{i}{j}"]} for j in range(20)]} for i in range(20)]
    },
    "long enum": {"enum": ["v" * 50 + str(at) for at in range(1000)]},
    "long word": {"enum": ["x" * 60_000]},
    "many patterns": {
        "type": "object",
        "patternProperties": {f"^a{i}.*b{{{i}}}$": {"type": "string"} for i in range(60)},
    },
    "endless array": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "endless string": {"type": "string", "minLength": 10**9, "maxLength": 10**9},
    "ranges": {
        "type": "object",
        "properties": {
            f"p{i}": {"type": "integer", "minimum": -(10**17) - i, "maximum": 10**18 + i}
            for i in range(300)
        },
    },
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_schema_holds_the_interpreter_or_fills_the_memory(grammars, bomb):
    """Refused, or followed for a while; meanwhile another thread runs."""
    process = psutil.Process()
    before, longest, done = process.memory_info().rss, [0.0], threading.Event()

    def breathe() -> None:
        last = time.monotonic()
        while not done.wait(0.001):
            now = time.monotonic()
            longest[0], last = max(longest[0], now - last), now

    thread = threading.Thread(target=breathe)
    thread.start()
    try:
        constraint = compiled(grammars, BOMBS[bomb]).constraint()
        chance = random.Random(1)
        for _ in range(50):
            choices = constraint.allowed().nonzero().flatten().tolist()
            if not choices or IM_END in choices:
                break
            constraint.accept(chance.choice(choices))
    except InvalidRequest:
        pass
    finally:
        done.set()
        thread.join()
    assert longest[0] < 20  # measured: 0.02; without limits minutes
    assert process.memory_info().rss - before < 200 * 2**20


def test_a_long_grammar_is_refused_before_it_is_compiled(grammars):
    with pytest.raises(InvalidRequest, match="characters"):
        grammars.compile("x" * (constraints.MAX_GRAMMAR_CHARACTERS + 1), "tools")


def test_a_busy_compiler_turns_requests_away(grammars, monkeypatch):
    monkeypatch.setattr(constraints, "WAIT_S", 0.01)
    with grammars._compiling, pytest.raises(Overloaded):
        compiled(grammars, {"const": "not compiled yet"})


def test_a_model_that_cannot_be_constrained_says_so():
    with pytest.raises(UnsupportedParameter, match="ends an answer"):
        Grammars(tiny_tokenizer(), VOCAB, frozenset())
    odd = type("Odd", (), {"is_fast": True, "__len__": lambda self: 5})()
    with pytest.raises(UnsupportedParameter, match="ValueError"):
        Grammars(odd, VOCAB, frozenset({IM_END}))
    constraints.prepare(odd, VOCAB, frozenset({IM_END}))
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(UnsupportedParameter, match="fast tokenizer"):
        Grammars(slow, VOCAB, frozenset({IM_END}))


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
KEYWORDS = st.sampled_from(["type", "properties", "items", "anyOf", "allOf", "enum", "const"]) | (
    st.sampled_from(["pattern", "minItems", "maximum", "multipleOf", "required", "$ref", "not"])
)
SCHEMAS = st.recursive(
    SCALARS | st.sampled_from(["string", "object", "integer", "#/a", "date"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS | st.text(max_size=3), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(schema=st.dictionaries(KEYWORDS, SCHEMAS, max_size=4), strict=st.booleans())
def test_no_schema_raises_anything_but_an_error_of_the_request(schema, strict):
    grammars = constraints.grammars(FUZZED, VOCAB, frozenset({IM_END}))
    try:
        constraint = compiled(grammars, schema, strict=strict).constraint()
        for _ in range(5):
            choices = constraint.allowed().nonzero().flatten().tolist()
            if not choices or IM_END in choices:
                break
            constraint.accept(choices[0])
    except InvalidRequest:  # what a request is told; anything else fails the test
        pass


FUZZED = tiny_tokenizer()
