"""The real model answers in JSON and calls tools, as the official client asks it to."""

import json
import shutil
from collections.abc import Iterator
from typing import Annotated
from typing import Any
from typing import Literal

import openai
import pytest
from pydantic import BaseModel
from pydantic import Field

from tests.support.server import Server
from tests.support.server import running
from tests.support.templates import weather
from tests.support.with_tools import copy_with_tools

# Everything has an end: a model this small may go on for ever where the schema lets it.
Word = Annotated[str, Field(max_length=20)]


class Capital(BaseModel):
    country: Word
    capital: Word


class Review(BaseModel):
    stars: Annotated[int, Field(ge=1, le=5)]
    mood: Literal["good", "bad"]
    words: Annotated[list[Word], Field(max_length=2)]


class Shape(BaseModel):
    kind: Literal["circle", "square"]
    size: Annotated[int, Field(ge=0, le=99)]
    inner: Capital | None


@pytest.fixture(scope="module")
def server(fetched: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = copy_with_tools(tmp_path_factory.mktemp("with-tools") / "smollm2-tools")
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


ASKED: dict[type[BaseModel], str] = {
    Capital: "What is the capital of France? Answer in JSON.",
    Review: "The film was a joy. Give stars, mood and two words, as JSON.",
    Shape: "Describe a small circle in JSON.",
}


@pytest.mark.parametrize("wanted", list(ASKED), ids=lambda wanted: wanted.__name__)
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_the_clients_parse_helper_gets_what_it_asked_for(client, model, wanted, seed):
    sampling: dict[str, Any] = (
        {"temperature": 0} if seed is None else {"seed": seed, "temperature": 1, "top_p": 0.9}
    )
    answer = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": ASKED[wanted]}],
        response_format=wanted,
        max_tokens=300,
        **sampling,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, wanted)


def test_any_json_object(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Name and age of a person, in JSON."}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=60,
    )
    choice = answer.choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:
        assert choice.finish_reason == "length"
    assert choice.message.content.startswith("{")


def test_json_that_is_cut_off_says_length(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": ASKED[Capital]}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=3,
    )
    assert answer.choices[0].finish_reason == "length"


def test_a_demanded_tool_is_called_and_its_result_taken(client, model):
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
    options: dict[str, Any] = {
        "model": model,
        "tools": [weather(strict=True)],
        "temperature": 0,
        "max_tokens": 100,
    }
    answer = client.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, **options
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    messages.append(choice.message)
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "Sunny, 25 degrees."})
    final = client.chat.completions.create(messages=messages, tool_choice="none", **options)
    assert final.choices[0].message.content
    assert final.choices[0].message.tool_calls is None


def test_a_streamed_call_is_put_together_by_the_client(client, model):
    class Weather(BaseModel):
        city: str

    tool = openai.pydantic_function_tool(Weather, name="weather")
    with client.chat.completions.stream(
        model=model,
        messages=[{"role": "user", "content": "What is the weather in Rome?"}],
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=100,
    ) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 2
    call = answer.choices[0].message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Weather)
