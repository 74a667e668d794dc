"""The official client comes back when it should, and raises its own classes for every status."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from service import errors
from service.errors import ServiceError
from tests.support.fake_deployment import MODEL_ID
from tests.web.test_clients import HELLO
from tests.web.test_clients import serving

CLASSES: dict[type[ServiceError], type[openai.APIStatusError]] = {
    errors.InvalidRequest: openai.BadRequestError,
    errors.ContextTooLong: openai.BadRequestError,
    errors.Unauthorized: openai.AuthenticationError,
    errors.ForbiddenHost: openai.PermissionDeniedError,
    errors.UnknownModel: openai.NotFoundError,
    errors.Overloaded: openai.RateLimitError,
    errors.RateLimited: openai.RateLimitError,
    errors.NonFiniteLogits: openai.InternalServerError,
    errors.NotReady: openai.InternalServerError,
    errors.EngineStopped: openai.InternalServerError,
    errors.DeadlineExceeded: openai.InternalServerError,
}


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """How long the client meant to wait; it does not."""
    found: list[float] = []
    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(sleep=found.append))
    return found


@pytest.fixture
def client(engine) -> Iterator[openai.OpenAI]:
    with serving(engine) as client:
        yield client


def ask(client: openai.OpenAI) -> Any:
    return client.chat.completions.create(model=MODEL_ID, messages=HELLO)


@pytest.mark.parametrize(("error", "raised"), CLASSES.items(), ids=lambda kind: kind.__name__)
def test_every_error_is_one_of_the_clients_classes(client, engine, error, raised):
    engine.refuse = error("this is why", hint="do that", param="messages")
    with pytest.raises(raised) as found:
        ask(client)
    assert found.value.status_code == error.status
    assert (found.value.code, found.value.type) == (error.code, error.type)
    assert found.value.param == "messages"
    assert "this is why" in found.value.message
    assert found.value.request_id == found.value.response.headers["x-request-id"]
    assert int(found.value.response.headers["openai-processing-ms"]) >= 0


@pytest.mark.parametrize("error", [errors.Overloaded, errors.RateLimited, errors.NotReady])
def test_it_waits_as_long_as_it_is_told_and_comes_back(client, engine, slept, error):
    engine.refuse = error("later", retry_after_s=17)

    def recovered(seconds: float) -> None:
        slept.append(seconds)
        engine.refuse = None

    openai._base_client.time.sleep = recovered  # the fixture's own
    answer = ask(client.with_options(max_retries=2))
    assert answer.choices[0].message.content == "Hello"
    assert slept == [17]


def test_it_gives_up_after_as_many_times_as_it_was_told(client, engine, slept):
    engine.refuse = errors.Overloaded("full", retry_after_s=3)
    with pytest.raises(openai.RateLimitError):
        ask(client.with_options(max_retries=2))
    assert slept == [3, 3]


def test_it_does_not_come_back_for_what_stays_wrong(client, engine, slept):
    engine.refuse = errors.ContextTooLong("too long")
    with pytest.raises(openai.BadRequestError):
        ask(client.with_options(max_retries=2))
    assert slept == []


def test_a_client_that_waits_no_longer_says_so(client, engine):
    engine.hang = True
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.3))
    engine.hang = False
    for submission in engine.submissions:
        submission.stream.end("stop")


def test_a_wrong_key_is_told_how_to_send_one(make_client):
    answer = make_client(api_keys=["k"]).get("/v1/models")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
