"""Requests that have to wait, or may not: comments in streams, deadlines, when to come back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.faults.control import Control
from tests.faults.serving import faulty
from tests.server.process import Server
from tests.server.test_real_app import CONF
from tests.server.test_real_app import chat as answer_of
from tests.server.test_real_app import ready
from tests.server.test_web import answer
from tests.server.test_web import chat
from tests.server.test_web import post
from tests.server.test_web import serving
from tests.support.fake_deployment import MODEL_ID
from tests.support.tiny import save_tiny

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
LONG = {"max_tokens": 450, "extra_body": {"ignore_eos": True}}


# --- comments while nothing is said


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("slow")
    with serving(folder, FAKE_ENGINE="slow", FAKE_PAUSE_S="0.1") as server:
        yield ready(server)


def test_a_stream_that_waits_for_its_first_token_says_so_in_comments(slow: Server) -> None:
    with answer(slow.send(post("/v1/chat/completions", chat(stream=True)))) as response:
        blocks = response.read().split(b"\n\n")
    comments = [at for at, block in enumerate(blocks) if block.startswith(b":")]
    said = next(at for at, block in enumerate(blocks) if b'"content":"H' in block)
    assert comments
    assert max(comments) < said
    assert {blocks[at] for at in comments} == {b": waiting"}


def test_the_official_client_does_not_notice_the_comments(slow: Server) -> None:
    url = f"http://127.0.0.1:{slow.port}/v1"
    with (
        OpenAI(base_url=url, api_key="key", max_retries=0) as client,
        client.chat.completions.create(model=MODEL_ID, messages=HELLO, stream=True) as chunks,
    ):
        text = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(text) == "Hello"


# --- a real engine with one place and no queue


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("narrow")


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Iterator[Server]:
    model = save_tiny(folder / "tiny")
    words = {"model": str(model), "max_context": 512, "max_sequences": 1}
    document = {
        "version": 1,
        "server": {"bind": "127.0.0.1:0", "threads": 16, "max_queue": 0, "grace_s": 5},
        "deployments": {"here": words | faulty(folder)},
    }
    (folder / "moorage.yaml").write_text(json.dumps(document))  # JSON is YAML
    with Server(folder / "log", conf=CONF, cwd=folder) as server:
        yield ready(server)


@pytest.fixture
def client(narrow: Server) -> Iterator[OpenAI]:
    url = f"http://127.0.0.1:{narrow.port}/v1"
    with OpenAI(base_url=url, api_key="key", max_retries=0) as made:
        yield made


def test_when_all_places_are_taken_the_answer_says_when_to_come_back(
    narrow: Server, client: OpenAI, folder: Path
) -> None:
    running = answer_of(narrow, 450)
    with Control.of(folder).during(forward={"do": "hold"}):
        next(running)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert 1 <= int(refused.value.response.headers["Retry-After"]) <= 60
    for _ in running:
        pass
    done = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert done.usage is not None
    assert done.usage.completion_tokens == 1


def test_a_deadline_of_the_clients_own_ends_its_request(client: OpenAI) -> None:
    hurry = {"X-Request-Timeout-S": "0.02"}
    with pytest.raises(openai.InternalServerError) as late:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_headers=hurry, **LONG)
    assert late.value.status_code == 504
    assert late.value.code == "deadline_exceeded"


def test_a_stream_whose_deadline_passes_ends_with_an_error(client: OpenAI) -> None:
    hurry = {"X-Request-Timeout-S": "0.02"}
    late_answer = client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, extra_headers=hurry, **LONG
    )
    with late_answer as chunks, pytest.raises(openai.APIError) as late:
        for _ in chunks:
            pass
    assert late.value.code == "deadline_exceeded"
