"""response_format, tools and tool_choice over HTTP, with an engine that says what it is told to."""

from typing import Any

import pytest

from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_engine import FakeEngine
from tests.support.templates import tool_tokenizer
from tests.support.templates import weather
from tests.support.tiny import IM_END
from tests.support.tiny import tiny_tokenizer
from tests.text.test_constraints import say
from tests.web.asking import CHAT
from tests.web.asking import chat_body
from tests.web.asking import error_of
from tests.web.asking import events

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
PERSON = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def asked(engine: FakeEngine, tokenizer: Any = None, **config: Any) -> Any:
    tokenizer = tool_tokenizer("hermes") if tokenizer is None else tokenizer
    serving = FakeServing(engine=engine, tokenizer=tokenizer, max_context=2000)
    return create_app(FakeDeployment(model=serving, **config)).test_client()


def saying(text: str) -> FakeEngine:
    return FakeEngine(answer=tuple(text.encode()))


def schema_format(schema: Any, **changes: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **changes}}


def constraint_of(engine: FakeEngine) -> Any:
    return engine.submissions[-1].params.constraint


def test_a_call_is_told_as_one():
    engine = saying("One moment.\n" + CALL)
    answer = asked(engine).post(CHAT, json=chat_body(tools=[weather()])).get_json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "One moment."
    call = choice["message"]["tool_calls"][0]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert '"name": "weather"' in bytes(engine.submissions[0].ids[1:-30]).decode(errors="replace")
    assert constraint_of(engine) is None


def test_text_is_null_when_there_are_calls_only():
    answer = asked(saying(CALL)).post(CHAT, json=chat_body(tools=[weather()])).get_json()
    assert answer["choices"][0]["message"]["content"] is None


def test_a_streamed_call_comes_in_deltas():
    body = chat_body(tools=[weather()], stream=True)
    text = asked(saying("Well. " + CALL + CALL)).post(CHAT, json=body).get_data(as_text=True)
    *chunks, done = events(text)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    entries = [entry for delta in deltas for entry in delta.get("tool_calls", ())]
    assert [e["index"] for e in entries if "id" in e] == [0, 1]
    assert all(e["function"].get("arguments") is not None for e in entries)
    first = "".join(e["function"]["arguments"] for e in entries if e["index"] == 0)
    assert first == '{"city": "Rome"}'
    assert "".join(delta.get("content") or "" for delta in deltas) == "Well."
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "tool_calls"
    assert {chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]} == {None}


def test_a_call_that_is_cut_off_has_length_as_its_reason():
    body = chat_body(tools=[weather()], max_tokens=60)
    choice = asked(saying(CALL)).post(CHAT, json=body).get_json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_every_choice_is_read_for_itself():
    answer = asked(saying(CALL)).post(CHAT, json=chat_body(tools=[weather()], n=2)).get_json()
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]}
    assert len(ids) == 2


def test_tool_choice_none_hides_the_tools_and_calls_nothing():
    engine = saying(CALL)
    body = chat_body(tools=[weather()], tool_choice="none")
    choice = asked(engine).post(CHAT, json=body).get_json()["choices"][0]
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"
    assert b"weather" not in bytes(i for i in engine.submissions[0].ids if i < 256)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_demanded_call_is_forced(choice):
    engine = saying(CALL)
    other = {"type": "function", "function": {"name": "clock"}}
    body = chat_body(tools=[other, weather()], tool_choice=choice)
    assert asked(engine).post(CHAT, json=body).status_code == 200
    constraint = constraint_of(engine)
    assert not constraint.allowed()[IM_END]
    assert say(constraint, CALL) == len(CALL)
    again = asked(engine).post(CHAT, json=body)
    assert again.status_code == 200
    clock = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    assert (say(constraint_of(engine), clock) == len(clock)) is (choice == "required")


def test_calls_are_not_parallel_if_they_may_not_be():
    engine = saying(CALL)
    body = chat_body(tools=[weather()], tool_choice="required", parallel_tool_calls=False)
    assert asked(engine).post(CHAT, json=body).status_code == 200
    assert say(constraint_of(engine), CALL + "\n" + CALL) == len(CALL)


def test_a_strict_tool_is_followed_even_if_calling_is_free():
    engine = saying(CALL)
    body = chat_body(tools=[weather(strict=True)])
    assert asked(engine).post(CHAT, json=body).status_code == 200
    wrong = CALL.replace("city", "town")
    assert say(constraint_of(engine), wrong) < len(wrong)


def test_results_of_tools_reach_the_template():
    engine = saying("Sunny.")
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sun"}]},
    ]
    body = chat_body(messages=messages, tools=[weather()])
    choice = asked(engine).post(CHAT, json=body).get_json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Sunny.", "refusal": None}
    prompt = bytes(i for i in engine.submissions[0].ids if i < 256).decode()
    assert CALL in prompt
    assert "<tool_response>\nsun\n</tool_response>" in prompt


def test_thoughts_are_told_apart():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{# <think></think> #}"
    client = asked(saying("<think>hm</think>\n\nYes."), tokenizer)
    message = client.post(CHAT, json=chat_body()).get_json()["choices"][0]["message"]
    assert message["reasoning_content"] == "hm"
    assert message["content"] == "Yes."


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"type": "json_object"}, '{"any": [1]}'),
        (schema_format(PERSON, strict=True), '{"a": 1}'),
        (schema_format(PERSON), '{"a": 1}'),
        (schema_format(None), '{"any": [1]}'),
    ],
)
def test_a_format_constrains_every_answer_for_itself(wanted, text):
    engine = saying(text)
    client = asked(engine, tiny_tokenizer())
    answer = client.post(CHAT, json=chat_body(response_format=wanted, n=2)).get_json()
    assert [c["message"]["content"] for c in answer["choices"]] == [text, text]
    first, second = (each.params.constraint for each in engine.submissions)
    assert first is not second
    for constraint in (first, second):
        assert say(constraint, text) == len(text)
        assert constraint.allowed()[IM_END]


def test_plain_text_is_no_constraint():
    engine = saying("x")
    body = chat_body(response_format={"type": "text"}, tools=[], tool_choice="auto")
    assert asked(engine, tiny_tokenizer()).post(CHAT, json=body).status_code == 200
    assert constraint_of(engine) is None


def test_keywords_left_out_are_named():
    client = asked(saying("[]"), tiny_tokenizer())
    wanted = schema_format({"type": "array", "uniqueItems": True})
    response = client.post(CHAT, json=chat_body(response_format=wanted))
    assert response.status_code == 200
    assert "schema.uniqueItems" in response.headers["x-moorage-ignored"]


def named(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


CALLED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[]"}}
FORMAT = "response_format"
SCHEMA = f"{FORMAT}.json_schema.schema"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({FORMAT: "json"}, FORMAT),
        ({FORMAT: {}}, f"{FORMAT}.type"),
        ({FORMAT: {"type": "xml"}}, f"{FORMAT}.type"),
        ({FORMAT: {"type": "json_schema"}}, f"{FORMAT}.json_schema"),
        ({FORMAT: schema_format(PERSON, name="a b")}, f"{FORMAT}.json_schema.name"),
        ({FORMAT: schema_format(PERSON, strict=1)}, f"{FORMAT}.json_schema.strict"),
        ({FORMAT: schema_format([])}, SCHEMA),
        ({FORMAT: schema_format({"type": 5})}, SCHEMA),
        ({FORMAT: schema_format({"type": "array", "uniqueItems": True}, strict=True)}, SCHEMA),
        ({FORMAT: schema_format({"multipleOf": 999_983})}, SCHEMA),
        ({FORMAT: {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({FORMAT: {"type": "json_object"}, "tools": [weather()]}, FORMAT),
        ({"tools": {}}, "tools"),
        ({"tools": [weather()] * 129}, "tools"),
        ({"tools": [weather(), weather()]}, "tools[1].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [named()]}, "tools[0].function.name"),
        ({"tools": [named(name="a", parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [named(name="a", strict="yes")]}, "tools[0].function.strict"),
        (
            {"tools": [named(name="a", parameters={"type": 5})], "tool_choice": "required"},
            "tools",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [weather()], "tool_choice": named(name="b")}, "tool_choice.function.name"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALLED]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [CALLED]}]},
            "messages[0].tool_calls",
        ),
    ],
)
def test_what_is_wrong_is_named(changes, param):
    engine = saying("x")
    error = error_of(asked(engine).post(CHAT, json=chat_body(**changes)), 400)
    assert error["param"] == param
    assert not engine.submissions


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [weather()]}, "tools"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
            "messages[0].role",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{**CALLED, "function": {"name": "f", "arguments": "{}"}}],
                    }
                ]
            },
            "messages[0].tool_calls",
        ),
    ],
)
def test_a_model_whose_template_knows_no_tools_says_so(changes, param):
    client = asked(saying("x"), tiny_tokenizer())
    error = error_of(client.post(CHAT, json=chat_body(**changes)), 400)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")
