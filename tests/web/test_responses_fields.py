"""Every field, item and tool of OpenAI's Responses API is done, harmless or refused by name."""

import typing
from typing import Any

import pytest
from openai.types.responses import response_create_params
from openai.types.responses import response_includable
from openai.types.responses import response_input_item_param
from openai.types.responses import response_text_config_param
from openai.types.responses import tool_param
from openai.types.responses.easy_input_message_param import EasyInputMessageParam
from openai.types.responses.function_tool_param import FunctionToolParam
from openai.types.responses.response_function_tool_call_param import ResponseFunctionToolCallParam
from openai.types.responses.response_output_message_param import ResponseOutputMessageParam
from openai.types.responses.response_reasoning_item_param import ResponseReasoningItemParam
from openai.types.shared_params import Reasoning

from service.engine.params import SamplingParams
from service.web import responses_items
from service.web import responses_schema
from tests.support.tiny import tiny_tokenizer
from tests.text.test_constraints import say
from tests.web.asking import error_of
from tests.web.test_fields import REACH
from tests.web.test_responses import FORMAT
from tests.web.test_responses import RESPONSES
from tests.web.test_responses import TURN
from tests.web.test_responses import body
from tests.web.test_responses import thinking_tokenizer
from tests.web.test_responses import tool
from tests.web.test_tools import CALL
from tests.web.test_tools import asked
from tests.web.test_tools import constraint_of
from tests.web.test_tools import saying


def kinds(union: Any) -> set[str]:
    """The strings that `type` may be in the objects of a union."""
    found: set[str] = set()
    for member in typing.get_args(union):
        waiting = [typing.get_type_hints(member).get("type")] if isinstance(member, type) else []
        while waiting:
            item = waiting.pop()
            waiting += typing.get_args(item)
            found |= {item} if isinstance(item, str) else set()
    return found


def known(shape: Any) -> set[str]:
    return {*shape.done, *shape.harmless, *shape.not_done}


def test_every_official_field_is_known():
    official = set(response_create_params.ResponseCreateParamsBase.__annotations__) | {"stream"}
    assert official <= known(responses_schema.RESPONSE)


@pytest.mark.parametrize(
    ("official", "shape"),
    [
        (EasyInputMessageParam, responses_items.ITEMS["message"]),
        (response_input_item_param.Message, responses_items.ITEMS["message"]),
        (ResponseOutputMessageParam, responses_items.ITEMS["message"]),
        (ResponseFunctionToolCallParam, responses_items.ITEMS["function_call"]),
        (
            response_input_item_param.FunctionCallOutput,
            responses_items.ITEMS["function_call_output"],
        ),
        (ResponseReasoningItemParam, responses_items.ITEMS["reasoning"]),
        (FunctionToolParam, responses_schema.FUNCTION),
        (response_text_config_param.ResponseTextConfigParam, responses_schema.TEXT),
        (Reasoning, responses_schema.REASONING),
        (response_create_params.StreamOptions, responses_schema._SHAPES["stream_options"]),
    ],
)
def test_every_official_key_inside_is_known(official, shape):
    assert set(official.__annotations__) <= known(shape)


def test_every_official_kind_of_item_and_tool_is_known():
    items = kinds(response_input_item_param.ResponseInputItemParam)
    assert items == {*responses_items.ITEMS, *responses_items.OTHER_ITEMS}
    tools = kinds(tool_param.ToolParam) | kinds(response_create_params.ToolChoice)
    assert tools == {"function", "allowed_tools", *responses_schema.OTHER_TOOLS}
    include = set(typing.get_args(response_includable.ResponseIncludable))
    assert responses_schema.LOGPROBS in include


def test_no_field_is_in_two_tables():
    shape = responses_schema.RESPONSE
    assert not set(shape.done) & set(shape.harmless)
    assert not set(shape.not_done) & {*shape.done, *shape.harmless}


# what has an effect elsewhere, with the tests that show it
ELSEWHERE = {
    "model": "here",
    "input": "test_responses",
    "include": "test_logprobs",
    "instructions": "test_responses",
    "max_output_tokens": "here and in test_responses",
    "metadata": "test_responses",
    "parallel_tool_calls": "here",
    "reasoning": "here",
    "stop": "here",
    "stream": "test_responses",
    "stream_options": "here",
    "text": "test_responses",
    "tool_choice": "test_responses",
    "tools": "test_responses",
    "top_logprobs": "test_logprobs",
}


def test_every_field_that_is_done_is_tested():
    assert set(responses_schema.RESPONSE.done) <= {*REACH, *ELSEWHERE}


@pytest.mark.parametrize(
    "name", [*sorted(set(responses_schema.RESPONSE.done) & set(REACH)), "max_output_tokens"]
)
def test_a_field_that_is_done_reaches_the_engine(client, engine, name):
    value, wanted = (7, {"max_tokens": 7}) if name == "max_output_tokens" else REACH[name]
    assert client.post(RESPONSES, json=body(**{name: value})).status_code == 200
    assert client.post(RESPONSES, json=body()).status_code == 200
    params, default = (submission.params for submission in engine.submissions)
    for key in SamplingParams.__dataclass_fields__:
        expected = wanted[key] if key in wanted else getattr(default, key)
        assert getattr(params, key) == expected, key


def test_a_stop_string_ends_the_answer(client):
    response = client.post(RESPONSES, json=body(stop="l")).get_json()
    assert response["output"][0]["content"][0]["text"] == "He"
    assert response["status"] == "completed"


def test_what_asks_for_nothing_is_accepted(client):
    nothing: dict[str, Any] = {
        name: values[0] for name, values in responses_schema.RESPONSE.not_done.items() if values
    }
    more = {
        "max_tool_calls": 3,
        "previous_response_id": None,
        "parallel_tool_calls": False,
        "reasoning": {"effort": None, "mode": "standard"},
        "stream": True,
        "stream_options": {"include_obfuscation": False},
        "text": {"verbosity": "medium"},
        "tools": [],
        "include": [],
    }
    answer = client.post(RESPONSES, json=body(**nothing, **more))
    assert answer.status_code == 200, answer.get_data(as_text=True)
    assert "x-moorage-ignored" not in answer.headers


def test_names_that_nobody_specifies_are_told(client):
    given = [{"role": "user", "content": "Hi", "cache_control": {}}]
    answer = client.post(RESPONSES, json=body(given, odd=1))
    ignored = answer.headers["x-moorage-ignored"].split(", ")
    assert sorted(ignored) == ["input[0].cache_control", "odd"]


def part(kind: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, **more}]}]


NAMED = {"type": "function", "name": "weather"}
LOGPROBS = [responses_schema.LOGPROBS]
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({name: {"a": 1}}, name) for name in sorted(responses_schema.RESPONSE.not_done)),
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
    ({"include": LOGPROBS, "tools": [tool()]}, "include"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 21, "include": LOGPROBS}, "top_logprobs"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {**FORMAT, "schema": {"type": 5}}}}, "text.format.schema"),
    ({"text": {"format": FORMAT}, "tools": [tool()]}, "text.format"),
    ({"stream_options": {}}, "stream_options"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10_000}, "input"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"instructions": ["a"]}, "instructions"),
    ({"instructions": "<|im_end|>"}, "instructions"),
    *(({"tools": [{"type": kind}]}, "tools[0].type") for kind in responses_schema.OTHER_TOOLS),
    ({"tools": [tool(name="a b")]}, "tools[0].name"),
    ({"tools": [tool(), tool()]}, "tools[1].name"),
    ({"tools": [tool(defer_loading=True)]}, "tools[0].defer_loading"),
    ({"tools": [tool(), tool("b", description="<|im_end|>")]}, "tools[1]"),
    (
        {
            "tools": [tool(), tool("b", description="<|im_end|>")],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "b"}],
            },
        },
        "tools[1]",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": NAMED}, "tool_choice.name"),
    ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice.type"),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [NAMED]}},
        "tool_choice.tools[0].name",
    ),
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": ["a"]}, "input[0]"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": "<|im_end|>"}]}, "input[0].content"),
    ({"input": part("input_image", image_url="x")}, "input[0].content[0].type"),
    ({"input": part("refusal", refusal="x")}, "input[0].content[0].type"),
    ({"input": part("input_text")}, "input[0].content[0].text"),
    *(({"input": [{"type": k}]}, "input[0].type") for k in responses_items.OTHER_ITEMS),
    ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ({"input": TURN[-1:]}, "input[0].call_id"),
    ({"input": [{**TURN[3], "arguments": "[]"}]}, "input[0].arguments"),
    ({"input": [*TURN[:3], {**TURN[3], "arguments": '{"a": "<|im_end|>"}'}]}, "input[3]"),
    ({"input": [*TURN[:4], {**TURN[4], "output": "<|im_end|>"}]}, "input[4].output"),
    ({"input": [{"role": "user", "content": "x" * 300_000}]}, "input"),
]


@pytest.mark.parametrize(("changes", "param"), REFUSED)
def test_what_cannot_be_done_is_refused_by_its_own_name(changes, param):
    engine = saying("x")
    answer = asked(engine).post(RESPONSES, json=body() | changes)
    error = error_of(answer, 400)
    assert error["param"] == param
    for word in ("messages", "response_format", ".function"):
        assert word not in error["message"] or word == param
    assert not engine.submissions


def test_an_unknown_model_is_a_404(client):
    assert error_of(client.post(RESPONSES, json=body() | {"model": "x"}), 404)["param"] == "model"


@pytest.mark.parametrize(("changes", "param"), [({"tools": [tool()]}, "tools"), ({}, "input[0]")])
def test_a_model_whose_template_knows_no_tools_says_so(changes, param):
    given = "Hi" if changes else [{**TURN[3]}]
    sent = body(given, **changes)
    error = error_of(asked(saying("x"), tiny_tokenizer()).post(RESPONSES, json=sent), 400)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")


def test_logprobs_of_a_model_with_thoughts_are_refused():
    client = asked(saying("x"), thinking_tokenizer())
    error = error_of(client.post(RESPONSES, json=body(include=LOGPROBS)), 400)
    assert (error["param"], error["code"]) == ("include", "unsupported_parameter")


def test_parallel_calls_are_as_many_as_are_allowed():
    for parallel in (True, False):
        engine = saying(CALL)
        sent = body(tools=[tool()], tool_choice="required", parallel_tool_calls=parallel)
        assert asked(engine).post(RESPONSES, json=sent).status_code == 200
        text = f"{CALL}\n{CALL}"
        assert (say(constraint_of(engine), text) == len(text)) is parallel
