"""Logprobs, echo and scored prompts on the real engine with a tiny model."""

import math
from collections.abc import Iterator

import pytest
import torch
from flask.testing import FlaskClient
from openai.types.responses import Response

from service.engine.engine import Engine
from service.engine.runner import Runner
from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_deployment import fake_config
from tests.support.responses import streamed
from tests.support.tiny import IM_START
from tests.support.tiny import tiny_model
from tests.support.tiny import tiny_tokenizer
from tests.web.asking import CHAT
from tests.web.asking import COMPLETIONS
from tests.web.asking import chat_body
from tests.web.asking import completion_body
from tests.web.asking import events

CONTEXT = 400


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    def place_inputs(model: object, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(inputs)

    runner = Runner(tiny_model(), place_inputs, max_context=CONTEXT, max_sequences=4)
    engine = Engine(runner, max_queue=8)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def client(engine: Engine) -> FlaskClient:
    serving = FakeServing(engine=engine, max_context=CONTEXT)
    return create_app(FakeDeployment(fake_config(), model=serving)).test_client()


def choice_of(client: FlaskClient, path: str, body: dict) -> dict:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.get_json()["choices"][0]


def parts_of(client: FlaskClient, path: str, body: dict) -> list[dict]:
    text = client.post(path, json=body | {"stream": True}).get_data(as_text=True)
    *chunks, done = events(text)
    assert done == "[DONE]"
    return [chunk["choices"][0] for chunk in chunks]


def expected(ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return tiny_model()(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_a_chat_tells_every_token_with_its_bytes_and_the_likeliest(client):
    body = chat_body(temperature=0, max_tokens=30, logprobs=True, top_logprobs=3, ignore_eos=True)
    choice = choice_of(client, CHAT, body)
    found = choice["logprobs"]["content"]
    assert len(found) == 30
    assert choice["logprobs"]["refusal"] is None
    for entry in found:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] <= 0
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["logprob"] >= entry["top_logprobs"][2]["logprob"]
    told = bytes(byte for entry in found for byte in entry["bytes"] if entry["token"][0] != "<")
    assert told.decode(errors="replace") == choice["message"]["content"]


def test_a_streamed_chat_tells_the_same_tokens_each_once(client):
    body = chat_body(temperature=0, max_tokens=30, logprobs=True, top_logprobs=2, ignore_eos=True)
    whole = choice_of(client, CHAT, body)["logprobs"]["content"]
    parts = parts_of(client, CHAT, body)
    streamed = [
        entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in whole]
    values = [entry["logprob"] for entry in whole]
    assert [entry["logprob"] for entry in streamed] == pytest.approx(values, abs=1e-3)


def test_without_logprobs_nothing_is_told(client):
    assert choice_of(client, CHAT, chat_body(max_tokens=3))["logprobs"] is None
    assert choice_of(client, COMPLETIONS, completion_body())["logprobs"] is None
    assert all(part["logprobs"] is None for part in parts_of(client, CHAT, chat_body()))


def test_a_completion_always_tells_the_chosen_token_among_the_top(client):
    body = completion_body(seed=1, temperature=2, max_tokens=20, logprobs=1, ignore_eos=True)
    found = choice_of(client, COMPLETIONS, body)["logprobs"]
    assert len(found["tokens"]) == len(found["top_logprobs"]) == len(found["text_offset"]) == 20
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
        assert 1 <= len(top) <= 2
    assert any(len(top) == 2 for top in found["top_logprobs"])


PROMPT = "the sea, the sea"


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_an_echo_scores_the_prompt_as_the_model_does(client, max_tokens):
    body = completion_body(prompt=PROMPT, echo=True, logprobs=2, temperature=0, ignore_eos=True)
    choice = choice_of(client, COMPLETIONS, body | {"max_tokens": max_tokens})
    found, wanted = choice["logprobs"], expected(list(PROMPT.encode()))
    count = len(PROMPT)
    assert choice["text"].startswith(PROMPT)
    assert choice["finish_reason"] == "length"
    assert found["tokens"][:count] == list(PROMPT)
    assert len(found["tokens"]) == count + max_tokens
    assert found["text_offset"][: count + 1] == list(range(count + (max_tokens > 0)))
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    for at in range(1, count):
        row = wanted[at - 1]
        assert found["token_logprobs"][at] == pytest.approx(float(row[ord(PROMPT[at])]), abs=1e-3)
        best = max(found["top_logprobs"][at].values())
        assert best == pytest.approx(float(row.max()), abs=1e-3)


def test_a_streamed_echo_says_and_tells_the_same_as_a_whole_one(client):
    body = completion_body(
        prompt=["ab", "cde"], n=2, seed=3, echo=True, logprobs=0, max_tokens=6, ignore_eos=True
    )
    wanted = client.post(COMPLETIONS, json=body).get_json()["choices"]
    parts = parts_of(client, COMPLETIONS, body)
    for choice in wanted:
        mine = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        for key in ("tokens", "text_offset"):
            told = [value for part in mine for value in part["logprobs"][key]]
            assert told == choice["logprobs"][key], key
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_an_echo_without_logprobs_begins_the_text_once(client):
    body = completion_body(prompt="abc", echo=True, max_tokens=5, ignore_eos=True, temperature=0)
    choice = choice_of(client, COMPLETIONS, body)
    assert choice["text"].startswith("abc")
    assert choice["logprobs"] is None
    assert "".join(part["text"] for part in parts_of(client, COMPLETIONS, body)) == choice["text"]


def test_only_an_echo_of_nothing_more_costs_no_answer(client):
    body = completion_body(prompt="abc", echo=True, max_tokens=0)
    answer = client.post(COMPLETIONS, json=body).get_json()
    assert answer["choices"][0]["text"] == "abc"
    assert answer["usage"]["completion_tokens"] == 0


def test_an_echo_of_token_ids_shows_control_tokens(client):
    body = completion_body(prompt=[IM_START, 97], echo=True, max_tokens=0, logprobs=0)
    choice = choice_of(client, COMPLETIONS, body)
    assert choice["text"] == "<|im_start|>a"
    assert choice["logprobs"]["text_offset"] == [0, len("<|im_start|>")]


def test_a_token_that_is_no_id_is_400_with_an_echo_too(client):
    for wrong in (-1, 258, 2**40):
        body = completion_body(prompt=[97, wrong], echo=True, max_tokens=0)
        response = client.post(COMPLETIONS, json=body)
        assert response.status_code == 400
        assert response.get_json()["error"]["param"] == "prompt"


def test_a_characters_bytes_share_its_place(client):
    body = completion_body(prompt="aüb", echo=True, max_tokens=0, logprobs=0)
    found = choice_of(client, COMPLETIONS, body)["logprobs"]
    assert found["tokens"] == ["a", "\\xc3", "\\xbc", "b"]
    assert found["text_offset"] == [0, 1, 1, 2]


def test_the_token_that_ends_a_completion_is_told_and_that_of_a_chat_is_not(client):
    """As lm-eval reads it: it drops the last token, which it takes for an answer's."""
    body = completion_body(prompt=PROMPT, echo=True, logprobs=1, max_tokens=1, temperature=0)
    first = choice_of(client, COMPLETIONS, body)["logprobs"]["tokens"][-1]
    token = tiny_tokenizer()(first)["input_ids"][0] if len(first) == 1 else int(first[2:], 16)
    choice = choice_of(client, COMPLETIONS, body | {"stop_token_ids": [token]})
    assert (choice["finish_reason"], choice["text"]) == ("stop", PROMPT)
    assert choice["logprobs"]["tokens"] == [*PROMPT, first]
    scores = choice["logprobs"]["token_logprobs"][1:-1]
    assert math.fsum(scores) < 0
    chat = chat_body(logprobs=True, temperature=0, max_tokens=1)
    first = choice_of(client, CHAT, chat)["logprobs"]["content"][0]["bytes"]
    ended = choice_of(client, CHAT, chat | {"stop_token_ids": [first[0]]})
    assert ended["logprobs"]["content"] == []


def test_a_bias_decides_and_logprobs_are_of_what_the_model_gave(client):
    body = chat_body(temperature=0, max_tokens=3, logit_bias={"65": 100}, logprobs=True)
    choice = choice_of(client, CHAT, body)
    assert choice["message"]["content"] == "AAA"
    assert choice["logprobs"]["content"][0]["logprob"] < -0.1


def test_a_second_prompt_is_found_computed(client):
    body = chat_body(messages=[{"role": "user", "content": "say " * 30}], max_tokens=2)
    client.post(CHAT, json=body)
    usage = client.post(CHAT, json=body).get_json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert usage["prompt_tokens"] - 1 == cached


def test_answers_to_one_prompt_differ_and_a_seed_repeats_them(client):
    body = completion_body(n=3, seed=5, max_tokens=12, ignore_eos=True)
    first = [c["text"] for c in client.post(COMPLETIONS, json=body).get_json()["choices"]]
    again = [c["text"] for c in client.post(COMPLETIONS, json=body).get_json()["choices"]]
    assert first == again
    assert len(set(first)) == 3


def test_a_response_has_the_logprobs_of_the_same_chat(client):
    limits = {"temperature": 0, "top_logprobs": 2}
    body = chat_body(logprobs=True, max_tokens=20, **limits)
    tokens = choice_of(client, CHAT, body)["logprobs"]["content"]
    include = ["message.output_text.logprobs"]
    asked = {"model": body["model"], "input": "Hi", "include": include, "max_output_tokens": 20}
    response = client.post("/v1/responses", json=asked | limits).get_json()
    found = response["output"][0]["content"][0]["logprobs"]
    assert [t["token"] for t in found] == [t["token"] for t in tokens]
    for one, other in zip(found, tokens, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
    assert all(len(t["top_logprobs"]) == 2 and t["bytes"] for t in found)
    assert Response.model_validate(response)
    text = client.post("/v1/responses", json=asked | limits | {"stream": True}).get_data(True)
    told = streamed(text)
    deltas = [e["logprobs"] for e in told if e["type"] == "response.output_text.delta"]
    assert [t for each in deltas for t in each] == found[: sum(map(len, deltas))]
    assert next(e for e in told if e["type"] == "response.output_text.done")["logprobs"] == found
