"""What a new user does first: serve the default model and ask it for the capital of France."""

import json
import subprocess
import time

import openai
import pytest
import requests

from tests.support.server import Server
from tests.support.server import events

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Write a very long story about the sea."}]
LONG = {"model": "smollm2-135m", "messages": STORY, "max_tokens": 3000, "ignore_eos": True}
"""Takes a minute and more: runs as long as somebody wants it."""


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url()}/v1", api_key="none", max_retries=0)


def used_tokens(server: Server) -> int:
    return int(server.placement()["kv"]["used_tokens"])


def wait_until_idle(server: Server) -> None:
    end = time.monotonic() + 120
    while used_tokens(server):
        assert time.monotonic() < end, "the slot was not freed"
        time.sleep(0.05)


def test_the_curl_of_the_ready_line_answers_paris(server: Server):
    done = subprocess.run(server.curl(), capture_output=True, text=True, check=True)
    assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_openai_client_gets_paris(client: openai.OpenAI):
    answer = client.chat.completions.create(model="smollm2-135m", messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_openai_client_gets_paris_streamed(client: openai.OpenAI):
    chunks = list(
        client.chat.completions.create(
            model="smollm2-135m",
            messages=QUESTION,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "The capital of France is Paris."
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 7
    assert len(chunks) > 5, "tokens arrive one by one"


def test_completions_continue_a_text(client: openai.OpenAI):
    answer = client.completions.create(
        model="smollm2-135m", prompt="The capital of France is", max_tokens=5, temperature=0
    )
    assert "Paris" in answer.choices[0].text


def test_the_placement_is_certified(server: Server):
    document = server.placement()
    assert document["state"] == "ready"
    assert document["certificate"]["valid"]
    classes = {check["class"] for check in document["certificate"]["checks"]}
    assert {"F1", "F2", "F4", "F7", "F8", "F12", "F13", "F15", "forward"} <= classes
    (cpu,) = document["devices"]
    assert cpu["planned"]["weights"] == cpu["measured"]["allocated"] > 250_000_000
    assert document["model"]["parameters"] == 134_515_008


def test_the_same_seed_gives_the_same_answer(server: Server):
    """Asked once before, because in bfloat16 a prompt whose beginning is found computed rounds
    otherwise, which may turn a choice. tests/engine has the same in float32, beside others.
    """
    ask = {"temperature": 1.0, "max_tokens": 12}
    server.chat("Name three colours.", **ask)
    first = server.chat("Name three colours.", **ask, seed=7)
    assert server.chat("Name three colours.", **ask, seed=7) == first
    assert server.chat("Name three colours.", **ask, seed=8) != first


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"[]", 400, None),
        (b'{"model": "smollm2-135m", "messages": 7}', 400, "messages"),
        (b'{"model": "gpt-9", "messages": [{"role": "user", "content": "x"}]}', 404, "model"),
        (b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "x"}], "n": 0}',
         400, "n"),
        (b" " * (5 * 2**20), 413, None),
    ],
    ids=["broken", "list", "type", "model", "n", "large"],
)  # fmt: skip
def test_a_bad_request_is_refused_in_json(
    server: Server, body: bytes, status: int, param: str | None
):
    response = requests.post(
        f"{server.url()}/v1/chat/completions",
        data=body,
        headers={"content-type": "application/json"},
        timeout=30,
    )
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["param"] == param


def test_wrong_methods_and_paths_are_refused_in_json(server: Server):
    url = server.url()
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/placement", 405),
        ("GET", "/nothing", 404),
    ):
        response = requests.request(method, url + path, timeout=30)
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_a_prompt_beyond_the_context_is_a_client_error_that_openai_knows(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens"):
        client.chat.completions.create(
            model="smollm2-135m", messages=[{"role": "user", "content": "sea " * 6000}]
        )


def test_a_client_that_leaves_a_stream_frees_its_slot(server: Server):
    body = LONG | {"stream": True}
    with server.post("/v1/chat/completions", body, stream=True) as response:
        data = (line for line in response.iter_lines() if line.startswith(b"data: "))
        assert b'"role"' in next(data)
        assert b'"content"' in next(data)
        assert used_tokens(server) > 0
    wait_until_idle(server)


def test_a_client_that_leaves_a_blocking_request_frees_its_slot(server: Server):
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(f"{server.url()}/v1/chat/completions", json=LONG, timeout=0.8)
    wait_until_idle(server)


def test_streams_have_openai_shape(server: Server):
    body = {
        "model": "smollm2-135m",
        "messages": QUESTION,
        "stream": True,
        "temperature": 0,
        "stop": ["Paris"],
    }
    response = server.post("/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response)
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [e["choices"][0]["finish_reason"] for e in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1]["choices"][0]["finish_reason"] == "stop"
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in found)
    assert text == "The capital of France is "


# the last test of the module: it ends the server
def test_sigterm_lets_a_running_stream_finish_and_exits_with_0(server: Server):
    body = {"model": "smollm2-135m", "messages": STORY, "stream": True, "max_tokens": 24}
    with server.post("/v1/chat/completions", body, stream=True) as response:
        lines = response.iter_lines(decode_unicode=True)
        next(lines)
        server.process.terminate()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in ("length", "stop")
    assert server.wait_exit() == 0
