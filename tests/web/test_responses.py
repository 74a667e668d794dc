"""POST /v1/responses: items in and out, by events or at once. Nothing is stored."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import TypeAdapter

from service.errors import DeadlineExceeded
from service.errors import Overloaded
from service.web import responses_answers
from service.web.responses_schema import response_request
from tests.support.fake_deployment import MODEL_ID
from tests.support.fake_engine import FakeEngine
from tests.support.responses import checked
from tests.support.responses import streamed
from tests.support.templates import tool_tokenizer
from tests.support.tiny import tiny_tokenizer
from tests.text.test_constraints import say
from tests.web.asking import error_of
from tests.web.test_tools import CALL
from tests.web.test_tools import PERSON
from tests.web.test_tools import asked
from tests.web.test_tools import constraint_of
from tests.web.test_tools import saying

RESPONSES = "/v1/responses"
FORMAT = {"type": "json_schema", "name": "x", "schema": PERSON}


def body(given: Any = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL_ID, "input": given, **fields}


def tool(name: str = "weather", **changes: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    }
    return {"type": "function", "name": name, "parameters": parameters, **changes}


def thinking_tokenizer(*, opened: bool = False) -> Any:
    """With tools and thoughts; opened: the template begins the thoughts itself."""
    tokenizer = tool_tokenizer("hermes")
    tokenizer.chat_template += "{# <think></think> #}"
    if opened:
        tokenizer.chat_template += "{%- if add_generation_prompt %}{{- '<think>\n' }}{%- endif %}"
    return tokenizer


def whole(client: Any, sent: Mapping[str, Any]) -> dict[str, Any]:
    answer = client.post(RESPONSES, json=sent)
    assert answer.status_code == 200, answer.get_data(as_text=True)
    found: dict[str, Any] = checked(answer.get_json())
    TypeAdapter(responses_answers.Response).validate_python(found, strict=True)
    return found


def events_of(client: Any, sent: Mapping[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(RESPONSES, json={**sent, "stream": True})
    assert answer.status_code == 200, answer.get_data(as_text=True)
    assert answer.mimetype == "text/event-stream"
    found = streamed(answer.get_data(as_text=True))
    for event in found:
        TypeAdapter(responses_answers.ResponseEvent).validate_python(event, strict=True)
    return found


def prompt_of(engine: FakeEngine) -> str:
    return bytes(i for i in engine.submissions[-1].ids if i < 256).decode()


# --- answers


def test_a_text_is_answered_with_one_message(client, engine):
    response = whole(client, body(metadata={"a": "b"}, instructions="Be kind.", temperature=0.5))
    (message,) = response["output"]
    assert (message["role"], message["status"]) == ("assistant", "completed")
    assert [part["text"] for part in message["content"]] == ["Hello"]
    assert response["status"] == "completed"
    assert response["store"] is False
    assert response["usage"] == {
        "input_tokens": len(engine.submissions[0].ids),
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(engine.submissions[0].ids) + 5,
    }
    assert (response["metadata"], response["instructions"]) == ({"a": "b"}, "Be kind.")
    assert response["temperature"] == engine.submissions[0].params.temperature == 0.5
    assert response["completed_at"] >= response["created_at"]


def test_a_stream_tells_the_same_piece_by_piece(client):
    names = [event["type"].removeprefix("response.") for event in events_of(client, body())]
    assert names == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


def test_a_stream_ends_without_done(client):
    text = client.post(RESPONSES, json=body(stream=True)).get_data(as_text=True)
    assert "[DONE]" not in text


@pytest.mark.parametrize("opened", [False, True])
def test_thoughts_text_and_calls_are_items_of_their_own(opened):
    said = "hm ok\n</think>\n\nYes. " + CALL + CALL
    said = said if opened else "<think>\n" + said
    client = asked(saying(said), thinking_tokenizer(opened=opened))
    sent = body(tools=[tool()])
    for response in (whole(client, sent), events_of(client, sent)[-1]["response"]):
        thought, message, *calls = response["output"]
        assert [p["text"] for p in thought["content"]] == ["hm ok"]
        assert [p["text"] for p in message["content"]] == ["Yes."]
        assert [(c["name"], c["arguments"]) for c in calls] == [("weather", '{"city": "Rome"}')] * 2
        assert len({c["call_id"] for c in calls}) == 2
        # a mark that is several tokens, as here, counts from where it is complete
        start = 0 if opened else len("<think>") - 1
        thoughts = said.index("</think>") + len("</think>") - start
        details = response["usage"]["output_tokens_details"]
        assert details == {"reasoning_tokens": thoughts}


def test_thoughts_that_are_empty_are_no_item():
    response = whole(asked(saying("<think>\n\n</think>\n\nYes."), thinking_tokenizer()), body())
    assert [item["type"] for item in response["output"]] == ["message"]


def test_an_answer_of_nothing_is_an_empty_message(client, engine):
    engine.answer = ()
    for response in (whole(client, body()), events_of(client, body())[-1]["response"]):
        assert [item["content"][0]["text"] for item in response["output"]] == [""]


@pytest.mark.parametrize(
    ("limit", "kinds"),
    [(9, ["reasoning"]), (22, ["reasoning", "message"]), (75, ["reasoning", "function_call"])],
)
def test_what_the_limit_cuts_off_is_incomplete(limit, kinds):
    said = "<think>hm</think>" + ("Yes, so it is." if limit == 22 else CALL)
    client = asked(saying(said), thinking_tokenizer())
    sent = body(tools=[tool()], max_output_tokens=limit)
    last = events_of(client, sent)[-1]
    assert last["type"] == "response.incomplete"
    for response in (whole(client, sent), last["response"]):
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["completed_at"] is None
        assert [item["type"] for item in response["output"]] == kinds
        statuses = [item["status"] for item in response["output"]]
        assert statuses == ["completed"] * (len(kinds) - 1) + ["incomplete"]


def test_an_error_in_a_stream_is_a_failed_response_with_what_was_said(client, engine):
    engine.fail = DeadlineExceeded("too slow")
    last = events_of(client, body())[-1]
    assert last["type"] == "response.failed"
    response = last["response"]
    assert response["status"] == "failed"
    assert response["error"]["message"] == "too slow"
    assert response["error"]["code"] == "server_error"
    assert [item["status"] for item in response["output"]] == ["incomplete"]
    assert error_of(client.post(RESPONSES, json=body()), 504)["code"] == "deadline_exceeded"


def test_an_error_that_nobody_expected_shows_its_id_only(client, engine, monkeypatch):
    def broken(*given: Any) -> Any:
        raise ValueError("secret")

    monkeypatch.setattr("service.web.responses_events.Output.add", broken)
    last = events_of(client, body())[-1]
    assert last["type"] == "response.failed"
    assert "secret" not in json.dumps(last)
    assert "request id" in last["response"]["error"]["message"]


def test_a_full_queue_is_a_real_429_for_a_stream(client, engine):
    engine.refuse = Overloaded("full")
    assert error_of(client.post(RESPONSES, json=body(stream=True)), 429)["code"] == "queue_full"


@pytest.mark.parametrize("method", ["get", "delete"])
def test_no_response_is_kept(client, method):
    error = error_of(getattr(client, method)(f"{RESPONSES}/resp_1"), 404)
    assert error["code"] == "response_not_found"
    assert "stores none" in error["message"]


# --- input

TURN: list[Any] = [
    {"role": "user", "content": "Rome?"},
    {"type": "reasoning", "id": "r", "summary": [], "content": [
        {"type": "reasoning_text", "text": "I should look."}]},
    {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [
        {"type": "output_text", "text": "One moment.", "annotations": [], "logprobs": []}]},
    {"type": "function_call", "id": "f", "call_id": "c1", "name": "weather", "status": "completed",
     "arguments": '{"city": "Rome"}'},
    {"type": "function_call_output", "call_id": "c1", "output": "Sunny."},
]  # fmt: skip


def shown(given: Any, **fields: Any) -> list[dict[str, Any]]:
    """The messages that the chat template is given."""
    asked, unknown = response_request(body(given, **fields))
    assert unknown == []
    return [dict(message) for message in asked.request.messages]


def test_items_of_one_turn_are_one_message_of_the_template():
    user, turn, result = shown(TURN)
    assert user == {"role": "user", "content": "Rome?"}
    assert turn["reasoning_content"] == "I should look."
    assert turn["content"] == "One moment."
    assert turn["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert result == {
        "role": "tool",
        "tool_call_id": "c1",
        "name": "weather",
        "content": "Sunny.",
    }


def test_turns_of_the_model_that_follow_each_other_stay_apart():
    say_one = {"role": "assistant", "content": "One."}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Two?"}]}
    one, two = shown([say_one, thought, {"role": "assistant", "content": "Two."}])
    assert one == {"role": "assistant", "content": "One."}
    assert two == {"role": "assistant", "content": "Two.", "reasoning_content": "Two?"}


def test_instructions_come_first_and_a_developer_speaks_for_the_system():
    given = [
        {"role": "developer", "content": [{"type": "input_text", "text": t} for t in ("a", "b")]},
        {"type": "message", "role": "user", "content": "Hi"},
    ]
    assert shown(given, instructions="First.") == [
        {"role": "system", "content": "First."},
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "Hi"},
    ]


def test_an_answers_own_items_can_be_sent_back():
    client = asked(saying("<think>hm</think>Yes. " + CALL), thinking_tokenizer())
    items = whole(client, body(tools=[tool()]))["output"]
    output = {
        "type": "function_call_output",
        "call_id": items[-1]["call_id"],
        "output": [{"type": "input_text", "text": "Sunny."}],
    }
    given = [{"role": "user", "content": "Rome?"}, *items, output]
    assert whole(client, body(given, tools=[tool()]))["status"] == "completed"


# --- tools and formats


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("required", CALL),
        ({"type": "function", "name": "weather"}, CALL),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "weather"}],
            },
            CALL,
        ),
    ],
)
def test_a_demanded_call_is_forced(choice, said):
    engine = saying(said)
    sent = body(tools=[tool("other"), tool()], tool_choice=choice)
    response = whole(asked(engine), sent)
    assert [item["type"] for item in response["output"]] == ["function_call"]
    assert response["tool_choice"] == choice
    assert [t["name"] for t in response["tools"]] == ["other", "weather"]
    constraint = constraint_of(engine)
    assert say(constraint, "Hello") == 0


def test_of_allowed_tools_the_model_is_shown_those_only():
    engine = saying("x")
    allowed = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "b"}],
    }
    whole(asked(engine), body(tools=[tool("a"), tool("b")], tool_choice=allowed))
    assert '"name": "b"' in prompt_of(engine)
    assert '"name": "a"' not in prompt_of(engine)


def test_without_a_word_of_strictness_parameters_are_followed_where_that_can_be():
    wrong = '<tool_call>\n{"name": "weather", "arguments": {"town'
    engine = saying("x")
    whole(asked(engine), body(tools=[tool()]))
    assert say(constraint_of(engine), wrong) < len(wrong)
    whole(asked(engine), body(tools=[tool(strict=False)]))
    assert constraint_of(engine) is None
    # a schema that cannot be followed whole is followed as far as that goes
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    whole(asked(engine), body(tools=[tool(parameters=odd)], tool_choice="required"))
    assert constraint_of(engine) is not None
    sent = body(tools=[tool(parameters=odd, strict=True)], tool_choice="required")
    assert error_of(asked(engine).post(RESPONSES, json=sent), 400)["param"] == "tools"


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [(FORMAT, '{"a": 1}', '{"b"'), ({"type": "json_object"}, '{"b": 1}', "[")],
)
def test_a_format_is_followed_and_repeated(form, right, wrong):
    engine = saying(right)
    response = whole(asked(engine, tiny_tokenizer()), body(text={"format": form}))
    assert response["text"] == {"format": form}
    assert say(constraint_of(engine), right) == len(right)
    whole(asked(engine, tiny_tokenizer()), body(text={"format": form}))
    assert say(constraint_of(engine), wrong) < len(wrong)


def test_keywords_left_out_are_named_as_they_were_sent():
    form = {**FORMAT, "schema": {"type": "array", "uniqueItems": True}}
    answer = asked(saying("[]"), tiny_tokenizer()).post(RESPONSES, json=body(text={"format": form}))
    assert answer.headers["x-moorage-ignored"] == "text.format.schema.uniqueItems"
