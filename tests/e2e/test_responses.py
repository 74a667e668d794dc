"""The Responses API of the official client, with the real model behind a real server."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.test_forms import ASKED
from tests.e2e.test_forms import Capital
from tests.support.responses import EVENTS
from tests.support.responses import check_order
from tests.support.server import Server
from tests.support.server import running
from tests.support.templates import HERMES
from tests.support.with_tools import copy_with_tools

# The model was not trained to think: where it is told to, its template begins the thoughts, and it
# never ends them.
THINKING = (
    HERMES + "{%- if add_generation_prompt and 'Think' in messages[-1].content %}"
    "{{- '<think>\n' }}{%- endif %}{# </think> #}"
)
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Now.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
QUESTION = "What is the capital of France?"
WEATHER = "What is the weather in Rome?"


@pytest.fixture(scope="module")
def server(fetched: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SmolLM2 with a chat template that knows tools and thoughts."""
    folder = copy_with_tools(tmp_path_factory.mktemp("with-thoughts") / "smollm2-thoughts")
    (folder / "chat_template.jinja").write_text(THINKING)
    with running(tmp_path_factory.mktemp("serve"), "--model", str(folder)) as running_server:
        running_server.wait_ready()
        yield running_server
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url()}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_a_question_is_answered(client, model):
    response = client.responses.create(
        model=model, input=QUESTION, temperature=0, max_output_tokens=40
    )
    assert "Paris" in response.output_text
    assert response.status == "completed"
    assert response.store is False
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_a_conversation_is_sent_back_item_by_item(client, model):
    given: list[Any] = [{"role": "user", "content": QUESTION}]
    options: dict[str, Any] = {"model": model, "temperature": 0, "max_output_tokens": 40}
    first = client.responses.create(input=given, **options)
    given += [item.to_dict() for item in first.output]
    given.append({"role": "user", "content": "And of Italy?"})
    second = client.responses.create(input=given, instructions="Answer in a word.", **options)
    assert second.output_text
    assert second.usage.input_tokens > first.usage.input_tokens


def test_every_event_of_a_stream_is_one_of_the_clients_own(client, model):
    with client.responses.create(
        model=model, input=QUESTION, temperature=0, max_output_tokens=40, stream=True
    ) as stream:
        events = [event.to_dict() for event in stream]
    for event in events:
        EVENTS[event["type"]].model_validate(event)
    check_order(events)
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert len(deltas) > 3
    assert "Paris" in "".join(deltas)


def test_the_clients_own_accumulator_ends_with_what_the_server_says(client, model):
    options: dict[str, Any] = {"model": model, "temperature": 0, "max_output_tokens": 40}
    with client.responses.stream(input=QUESTION, **options) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text
    assert text == client.responses.create(input=QUESTION, **options).output_text


def test_an_answer_that_is_cut_off_is_incomplete(client, model):
    response = client.responses.create(
        model=model, input=QUESTION, temperature=0, max_output_tokens=2
    )
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 2


def test_the_clients_parse_helper_gets_what_it_asked_for(client, model):
    response = client.responses.parse(
        model=model,
        input=ASKED[Capital],
        text_format=Capital,
        temperature=0,
        max_output_tokens=300,
    )
    assert isinstance(response.output_parsed, Capital)


def test_a_streamed_format_is_parsed_by_the_client(client, model):
    with client.responses.stream(
        model=model,
        input=ASKED[Capital],
        text_format=Capital,
        temperature=0,
        max_output_tokens=300,
    ) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_response().output_parsed, Capital)


def test_a_function_is_called_and_its_result_taken(client, model):
    given: list[Any] = [{"role": "user", "content": WEATHER}]
    options: dict[str, Any] = {
        "model": model,
        "tools": [TOOL],
        "temperature": 0,
        "max_output_tokens": 100,
    }
    response = client.responses.create(
        input=given, tool_choice="required", parallel_tool_calls=False, **options
    )
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "weather")
    assert set(json.loads(call.arguments)) == {"city"}
    given += [item.to_dict() for item in response.output]
    given.append(
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 25 degrees."}
    )
    final = client.responses.create(input=given, tool_choice="none", **options)
    assert final.output_text


def test_a_streamed_call_is_put_together_by_the_client(client, model):
    with client.responses.stream(
        model=model,
        input=WEATHER,
        tools=[TOOL],
        tool_choice={"type": "function", "name": "weather"},
        temperature=0,
        max_output_tokens=100,
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.delta") > 2
    assert set(json.loads(final.output[0].arguments)) == {"city"}


def test_thoughts_are_an_item_of_a_response_and_a_field_of_a_chat(client, model):
    asked = f"Think: {QUESTION}"
    with client.responses.stream(
        model=model, input=asked, temperature=0, max_output_tokens=5
    ) as stream:
        events = [event.to_dict() for event in stream]
    response = events[-1]["response"]
    (thought,) = response["output"]
    assert (thought["type"], thought["status"]) == ("reasoning", "incomplete")
    text = thought["content"][0]["text"]
    deltas = [e["delta"] for e in events if e["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == text != ""
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 5}
    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": asked}],
        temperature=0,
        max_completion_tokens=5,
    )
    assert chat.choices[0].message.reasoning_content == text
    assert chat.choices[0].message.content == ""
    assert chat.usage.completion_tokens_details.reasoning_tokens == 5
    given: list[dict[str, Any]] = [{"role": "user", "content": asked}, thought]
    given += [{"role": "assistant", "content": "Paris."}, {"role": "user", "content": QUESTION}]
    again = client.responses.create(model=model, input=given, temperature=0, max_output_tokens=9)
    assert again.output_text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ],
)
def test_what_is_not_done_is_the_clients_own_error(client, model, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=model, input="Hi", **fields)
    assert (refused.value.param, refused.value.code) == (param, "unsupported_parameter")


def test_no_response_can_be_fetched_or_deleted(client):
    with pytest.raises(openai.NotFoundError, match="stores none"):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError, match="stores none"):
        client.responses.delete("resp_1")
