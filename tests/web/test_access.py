"""One line in the log for each request, at its end."""

import logging
from typing import Any

import pytest

from service.errors import StepFailed
from service.web import generation
from tests.web.asking import CHAT
from tests.web.asking import COMPLETIONS
from tests.web.asking import body_for
from tests.web.asking import chat_body
from tests.web.asking import completion_body


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """What the lines so far say, as mappings."""
    caplog.set_level(logging.INFO)

    def read() -> list[dict[str, Any]]:
        return [r.fields for r in caplog.records if r.name == "moorage.access"]

    return read


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line_when_its_answer_is_through(make_client, engine, lines, path, stream):
    client = make_client(api_keys=["alice: secret-key"])
    headers = {"Authorization": "Bearer secret-key", "X-Request-Id": "mine"}
    response = client.post(path, json=body_for(path, stream=stream), headers=headers)
    if stream:
        assert lines() == []
    response.get_data()
    response.close()
    (line,) = lines()
    first = line.pop("first_token_seconds")
    assert line.pop("seconds") >= first >= line.pop("queue_seconds") >= 0
    assert line == {
        "event": "request",
        "request_id": "mine",
        "key": "alice",
        "method": "POST",
        "route": path,
        "status": 200,
        "prompt_tokens": len(engine.submissions[0].ids),
        "completion_tokens": 5,
        "finish_reason": "stop",
    }


def test_neither_prompt_nor_answer_nor_key_nor_path_is_in_any_line(make_client, lines, caplog):
    caplog.set_level(logging.DEBUG)
    client = make_client(api_keys=["secret-key"])
    headers = {"Authorization": "Bearer secret-key"}
    said = [{"role": "user", "content": "my secret question"}]
    client.post(CHAT, json=chat_body(messages=said), headers=headers).close()
    client.get("/secret/path?secret=1", headers=headers).close()
    client.post(CHAT, data=b'{"secret', headers=headers).close()
    assert [line["route"] for line in lines()] == [CHAT, "-", CHAT]
    ours = [r.getMessage() for r in caplog.records if r.name == "moorage.access"]
    assert "secret" not in "".join(ours)
    assert "secret-key" not in caplog.text
    assert "question" not in caplog.text
    assert "Hello" not in caplog.text


def test_an_error_has_its_code(client, lines):
    client.post(CHAT, json=chat_body(temperature=9)).close()
    client.get("/nowhere").close()
    found = [(line["status"], line["error"]) for line in lines()]
    assert found == [(400, "invalid_value"), (404, "not_found")]


def test_an_error_within_a_stream_has_its_code_beside_the_status_that_was_sent(
    client, engine, lines
):
    engine.fail = StepFailed("no")
    with client.post(CHAT, json=chat_body(stream=True)) as response:
        response.get_data()
    (line,) = lines()
    assert (line["status"], line["error"], line["completion_tokens"]) == (200, "step_failed", 5)
    assert "finish_reason" not in line


def test_a_stream_that_nobody_reads_to_its_end_says_so(client, engine, lines, monkeypatch):
    monkeypatch.setattr(generation, "TICK_S", 0.001)
    engine.hang = True
    client.post(CHAT, json=chat_body(stream=True)).close()
    (line,) = lines()
    assert (line["status"], line["error"]) == (200, "client_closed_request")


def test_several_answers_are_one_line(client, lines):
    client.post(COMPLETIONS, json=completion_body(prompt=["a", "b"], max_tokens=3)).close()
    (line,) = lines()
    assert (line["completion_tokens"], line["finish_reason"]) == (6, "length")


def test_probes_are_logged_for_debugging_only(client, lines, caplog):
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        client.get(path).close()
    assert lines() == []
    caplog.set_level(logging.DEBUG, logger="moorage.access")
    client.get("/health/live").close()
    assert [line["route"] for line in lines()] == ["/health/live"]


def test_a_request_for_the_head_is_one_line_too(client, lines):
    client.head("/v1/models").close()
    assert [(line["method"], line["status"]) for line in lines()] == [("HEAD", 200)]


def test_a_plain_line_is_names_and_values(client, caplog):
    caplog.set_level(logging.INFO)
    client.open("/v1/models", method="GET", headers={"X-Request-Id": "r"}).close()
    client.open("/v1/models", method="od d").close()
    first, second = [r.getMessage() for r in caplog.records if r.name == "moorage.access"]
    assert first.startswith("request_id=r method=GET route=/v1/models status=200 seconds=0.")
    assert "method=- " in second
