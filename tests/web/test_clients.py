"""The official OpenAI client against a real server on loopback."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from openai import OpenAI
from werkzeug.serving import make_server

from service.errors import DeadlineExceeded
from service.errors import EngineStopped
from service.errors import Overloaded
from service.web.app import create_app
from tests.support.fake_deployment import MODEL_ID
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_deployment import fake_config
from tests.support.fake_engine import FakeEngine

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]


@contextmanager
def serving(engine: FakeEngine, **config: Any) -> Iterator[OpenAI]:
    deployment = FakeDeployment(fake_config(**config), model=FakeServing(engine=engine))
    server = make_server("127.0.0.1", 0, create_app(deployment), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="key", max_retries=0
        ) as client:
            yield client
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[OpenAI]:
    with serving(engine) as client:
        yield client


def test_a_chat(client):
    answer = client.chat.completions.create(model=MODEL_ID, messages=HELLO)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 5


def test_a_streamed_chat(client, engine):
    engine.answer = list("Grüße 😀".encode())
    options = {"include_usage": True}
    with client.chat.completions.create(
        model=MODEL_ID, messages=HELLO, stream=True, stream_options=options
    ) as stream:
        *chunks, usage = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Grüße 😀"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert usage.usage.completion_tokens == len(engine.answer)


def test_the_clients_own_stream_helper_builds_the_whole_answer(client):
    with client.chat.completions.stream(model=MODEL_ID, messages=HELLO) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == "Hello"


def test_a_completion_streamed_and_not(client):
    answer = client.completions.create(model=MODEL_ID, prompt=["a", "b"])
    assert [c.text for c in answer.choices] == ["Hello", "Hello"]
    with client.completions.create(model=MODEL_ID, prompt="a", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL_ID]
    assert client.models.retrieve(MODEL_ID).owned_by == "moorage"


def test_errors_are_the_clients_own_classes(client, engine):
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        ask(model=MODEL_ID, messages=HELLO, store=True)
    assert (bad.value.param, bad.value.code) == ("store", "unsupported_parameter")
    assert bad.value.type == "invalid_request_error"
    assert bad.value.request_id == bad.value.response.headers["x-request-id"]
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(model="other", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    engine.refuse = Overloaded("full")
    with pytest.raises(openai.RateLimitError):
        ask(model=MODEL_ID, messages=HELLO)
    engine.refuse, engine.fail = None, DeadlineExceeded("slow")
    with pytest.raises(openai.InternalServerError) as slow:
        ask(model=MODEL_ID, messages=HELLO)
    assert slow.value.status_code == 504


def test_an_error_in_a_stream_is_raised_by_the_client(client, engine):
    engine.fail = EngineStopped("the engine stopped")
    with (
        client.chat.completions.create(model=MODEL_ID, messages=HELLO, stream=True) as stream,
        pytest.raises(openai.APIError, match="the engine stopped") as failed,
    ):
        list(stream)
    assert failed.value.code == "engine_stopped"


def test_a_wrong_key_is_an_authentication_error(engine):
    with serving(engine, api_keys=["key"]) as client:
        assert client.models.list().data
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
