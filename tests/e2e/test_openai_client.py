"""The official Python client on its own terms: its script, its retries, timeouts and leaving."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.run import ENCODER
from tests.clients.run import script
from tests.support.server import Server
from tests.support.server import environment
from tests.support.server import running
from tests.support.with_tools import copy_with_tools
from tests.support.with_tools import fetch

MODEL = "smollm2-135m"
KEY = "sk-test"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
# an answer that nobody waits for
LONG: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Write a very long story about the sea."}],
    "max_tokens": 3000,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One request at a time: nine threads, of which eight are kept for health."""
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "moorage.yaml").write_text(
        f"version: 1\nserver: {{threads: 9}}\ndeployments: {{x: {{model: {MODEL}}}}}\n"
    )
    with running(folder, MOORAGE_API_KEYS=KEY) as server:
        yield server


def client_of(server: Server, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url()}/v1", api_key=KEY, **options)


def says_paris(client: openai.OpenAI) -> bool:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    return answer.choices[0].message.content == PARIS


# the first test of the module: the server has just been started
def test_its_retries_carry_it_over_the_load_of_the_model(narrow: Server):
    with client_of(narrow, max_retries=60) as client:
        assert says_paris(client)


def test_its_retries_carry_it_over_a_full_server(narrow: Server):
    statuses: list[int] = []
    refused = threading.Event()

    def note(response: Any) -> None:
        statuses.append(response.status_code)
        if response.status_code == 429:
            refused.set()

    told: list[bool] = []
    noting = openai.DefaultHttpxClient(event_hooks={"response": [note]})
    with (
        client_of(narrow, max_retries=60) as holding,
        client_of(narrow, max_retries=0) as hasty,
        client_of(narrow, max_retries=60, http_client=noting) as patient,
    ):
        asking = threading.Thread(target=lambda: told.append(says_paris(patient)))
        with holding.chat.completions.create(**LONG, stream=True) as stream:
            assert next(iter(stream)).choices
            with pytest.raises(openai.RateLimitError) as full:
                says_paris(hasty)
            asking.start()
            assert refused.wait(60)
        asking.join(120)
    assert full.value.code == "queue_full"
    assert int(full.value.response.headers["retry-after"]) >= 1
    assert told == [True]
    assert (statuses[0], statuses[-1]) == (429, 200)


def test_an_answer_it_gives_up_waiting_for_leaves_its_place_to_the_next(narrow: Server):
    with client_of(narrow, max_retries=60) as client:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(max_retries=0, timeout=0.8).chat.completions.create(**LONG)
        assert says_paris(client)


def test_a_task_that_is_cancelled_in_a_stream_leaves_its_place_to_the_next(narrow: Server):
    begun = asyncio.Event()

    async def read(client: openai.AsyncOpenAI) -> None:
        async with await client.chat.completions.create(**LONG, stream=True) as stream:
            async for _ in stream:
                begun.set()

    async def leave() -> str | None:
        url = f"{narrow.url()}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=60) as client:
            task = asyncio.create_task(read(client))
            await asyncio.wait_for(begun.wait(), 60)
            task.cancel()
            await asyncio.wait([task])
            answer = await client.chat.completions.create(
                model=MODEL, messages=QUESTION, temperature=0
            )
            return answer.choices[0].message.content

    assert asyncio.run(leave()) == PARIS


def test_a_wrong_key_is_not_tried_again(narrow: Server):
    with (
        client_of(narrow).with_options(api_key="sk-other") as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.models.list()
    assert refused.value.code == "invalid_api_key"


@pytest.mark.timeout(600)
def test_the_script_of_the_documentation_runs(tmp_path_factory: pytest.TempPathFactory):
    """The one that `python -m tests.clients.run openai` runs as well, with a pinned version."""
    folder = copy_with_tools(tmp_path_factory.mktemp("with-tools") / MODEL)
    (folder.parent / "encoder").mkdir()
    fetch(ENCODER)
    with (
        running(folder.parent, "--model", str(folder), MOORAGE_API_KEYS=KEY) as server,
        running(folder.parent / "encoder", "--model", ENCODER, MOORAGE_API_KEYS=KEY) as encoder,
    ):
        variables = {
            "OPENAI_BASE_URL": f"{server.wait_ready()}/v1",
            "EMBEDDINGS_BASE_URL": f"{encoder.wait_ready()}/v1",
            "OPENAI_API_KEY": KEY,
        }
        done = subprocess.run(
            [sys.executable, script("openai")],
            env={**environment(), **variables},
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "async"
