"""A real embedding model under gunicorn, asked by OpenAI's own client.

Compared with transformers alone, text by text, and without anything of ours.
"""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import requests
import torch
import transformers

from tests.support.server import ROOT
from tests.support.server import Server
from tests.support.server import environment
from tests.support.server import running

MODEL = "all-minilm-l6-v2"
TEXTS = [
    "A cat sleeps on the warm windowsill.",
    "a",
    "The kitten is napping by the window in the sun.",
    "Interest rates were raised by a quarter of a percent on Thursday. " * 12,
    "The central bank raised interest rates.",
    "\u732b\u306f\u7a93\u8fba\u3067\u7720\u308b",
    "How do I install a package with pip?",
    "One " * 100,
    "Which command adds a Python library?",
    " tabs\tand\nlines ",
]


@pytest.fixture(scope="module")
def folder() -> str:
    """Fetched as a user would; prints where it is."""
    command = [sys.executable, "-m", "service.cli", "model", "fetch", MODEL]
    done = subprocess.run(
        command, check=True, cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folder: str) -> Iterator[Server]:
    where = tmp_path_factory.mktemp("embeddings")
    (where / "moorage.yaml").write_text(
        f"version: 1\ndeployments:\n  here:\n    model: {MODEL}\n    strategy: cpu\n"
        "    max_sequences: 4\n"
    )
    with running(where) as running_server:
        running_server.wait_ready()
        yield running_server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url()}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(folder: str) -> "np.ndarray[Any, Any]":
    """[texts, 384]: the mean of the last hidden states, scaled to length 1, each text alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for text in TEXTS:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(0)
        rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def off(found: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(found) - expected).max())


def test_the_curl_of_the_ready_line_gets_an_embedding(server: Server):
    done = subprocess.run(server.curl(), capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["data"][0]["embedding"]) == 384


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_a_batch_of_mixed_lengths_is_what_transformers_gives_text_by_text(
    client: openai.OpenAI, expected: Any, encoding: Any
):
    """Without an encoding the client asks for base64 and unpacks it."""
    asked = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(model=MODEL, input=TEXTS, **asked)
    found = [item.embedding for item in answer.data]
    if encoding == "base64":
        found = [np.frombuffer(base64.b64decode(str(row)), "<f4") for row in found]
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))
    assert off(found, expected) < 1e-5


def test_each_text_alone_is_the_same(client: openai.OpenAI, expected: Any):
    for text, row in zip(TEXTS, expected, strict=True):
        answer = client.embeddings.create(model=MODEL, input=text, encoding_format="float")
        assert off(answer.data[0].embedding, row) < 1e-5


def test_token_ids_are_the_text_they_came_from(server: Server, client: openai.OpenAI):
    counted = server.post("/tokenize", {"model": MODEL, "prompt": TEXTS[0]}).json()
    answer = client.embeddings.create(model=MODEL, input=[counted["tokens"]])
    text = client.embeddings.create(model=MODEL, input=TEXTS[0])
    assert off(answer.data[0].embedding, np.asarray(text.data[0].embedding)) < 1e-6
    assert answer.usage.prompt_tokens == counted["count"] == text.usage.total_tokens
    assert counted["max_model_len"] == 256


def test_texts_of_one_meaning_are_closer_than_others(client: openai.OpenAI):
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    rows = np.asarray([item.embedding for item in answer.data])
    near = rows @ rows.T
    for a, b, other in ((0, 2, 4), (3, 4, 6), (6, 8, 0)):
        assert near[a, b] > near[a, other] + 0.3


def test_many_more_inputs_than_run_or_wait_are_answered_in_order(client: openai.OpenAI):
    words = [f"number {count}" for count in range(700)]
    answer = client.embeddings.create(model=MODEL, input=words)
    assert [item.index for item in answer.data] == list(range(700))
    for at in (0, 350, 699):
        alone = client.embeddings.create(model=MODEL, input=words[at])
        assert off(answer.data[at].embedding, np.asarray(alone.data[0].embedding)) < 1e-5


def test_a_text_beyond_the_context_is_a_client_error_that_openai_knows(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens") as no:
        client.embeddings.create(model=MODEL, input=["short", "sea " * 300])
    assert no.value.code == "context_length_exceeded"
    assert no.value.param == "input[1]"


def test_shorter_embeddings_are_refused_of_a_model_that_was_not_trained_for_them(
    client: openai.OpenAI,
):
    with pytest.raises(openai.BadRequestError, match="nothing says that this model's embeddings"):
        client.embeddings.create(model=MODEL, input="x", dimensions=128)
    full = client.embeddings.create(model=MODEL, input="x", dimensions=384)
    assert len(full.data[0].embedding) == 384


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("completions", {"prompt": "Hi"}),
        ("responses", {"input": "Hi"}),
    ],
)
def test_text_is_not_generated_and_that_is_said(server: Server, path: str, body: dict[str, Any]):
    response = server.post(f"/v1/{path}", {"model": MODEL, **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "model"
    assert "gives embeddings; it generates no text" in error["message"]


def test_the_model_says_what_it_can(client: openai.OpenAI):
    (model,) = client.models.list().data
    said = model.model_dump()
    assert said["id"] == MODEL
    assert (said["context_length"], said["embedding_dimension"]) == (256, 384)
    assert {name for name, able in said["capabilities"].items() if able} == {"embeddings"}


def test_the_placement_is_planned_without_kv_and_certified(server: Server):
    document = server.placement()
    assert document["certificate"]["valid"]
    assert document["kv"] == {"bytes_per_token": 0, "planned_tokens": 0, "used_tokens": 0}
    assert document["engine"]["path"] == "padded"
    (cpu,) = document["devices"]
    assert cpu["planned"]["kv"] == 0
    assert cpu["planned"]["weights"] == cpu["measured"]["allocated"] > 90_000_000


def test_metrics_count_inputs_and_generated_tokens_apart(server: Server):
    text = requests.get(f"{server.url()}/metrics", timeout=30).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    found = {name.partition("{")[0]: float(value) for name, value in values.items()}
    assert found["moorage:generation_tokens_total"] == 0
    assert found["moorage:num_requests_running"] == found["moorage:num_requests_waiting"] == 0


# the last test of the module: it ends the server
def test_sigterm_ends_it_in_good_order(server: Server):
    server.process.terminate()
    assert server.wait_exit() == 0
    assert "Traceback" not in server.text
