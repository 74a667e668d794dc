"""Text to token ids and back, in vLLM's shapes."""

import pytest

from service.web.app import create_app
from tests.support.fake_deployment import MODEL_ID
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.templates import tool_tokenizer
from tests.support.templates import weather
from tests.web.asking import CHAT
from tests.web.asking import chat_body
from tests.web.asking import error_of


def tokenize(client, **body):
    return client.post("/tokenize", json=body)


def test_a_prompt_becomes_ids_and_their_strings(client):
    answer = tokenize(client, model=MODEL_ID, prompt="Hi ä", return_token_strs=True).get_json()
    assert list(answer) == ["count", "max_model_len", "tokens", "token_strs"]
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) > 0
    assert answer["max_model_len"] == 200
    assert tokenize(client, prompt="Hi ä").get_json()["token_strs"] is None


@pytest.mark.parametrize("text", ["Hi ä", "  two  spaces \n", "<|im_end|>", ""])
def test_ids_become_the_same_text_again(client, text):
    ids = tokenize(client, prompt=text, add_special_tokens=False).get_json()["tokens"]
    answer = client.post("/detokenize", json={"model": MODEL_ID, "tokens": ids})
    assert answer.get_json() == {"prompt": text}


def test_messages_become_the_ids_that_a_chat_runs(client, engine):
    messages = chat_body()["messages"]
    answer = tokenize(client, messages=messages, add_generation_prompt=True).get_json()
    client.post(CHAT, json=chat_body())
    assert answer["tokens"] == engine.submissions[0].ids
    assert engine.submissions == engine.submissions[:1], "nothing was generated for it"


TOOL = weather()


def test_tools_are_counted_as_a_chat_shows_them(engine):
    serving = FakeServing(engine, tool_tokenizer("hermes"), max_context=1000)
    client = create_app(FakeDeployment(model=serving)).test_client()
    assert client.get(f"/v1/models/{MODEL_ID}").get_json()["capabilities"]["tools"] is True
    messages = chat_body()["messages"]
    answer = tokenize(client, messages=messages, tools=[TOOL]).get_json()
    assert answer["count"] > tokenize(client, messages=messages).get_json()["count"]
    chat = client.post(CHAT, json=chat_body(tools=[TOOL]))
    assert chat.status_code == 200, chat.get_json()
    assert answer["tokens"] == engine.submissions[0].ids


def test_text_beyond_the_context_is_counted(client):
    assert tokenize(client, prompt="word " * 1000).get_json()["count"] > 200
    messages = [{"role": "user", "content": "word " * 1000}]
    assert tokenize(client, messages=messages).get_json()["count"] > 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "tools": [TOOL]}, "tools"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [TOOL]}, "tools"),
        ({"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ({"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
        ({"prompt": "a", "model": 3}, "model"),
        ({"messages": "a"}, "messages"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},) * 1
        + ("add_special_tokens",),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template": "x"}, "chat_template"),
        ({"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
def test_what_is_wrong_with_a_text_is_named(client, body, param):
    assert error_of(tokenize(client, **body), 400)["param"] == param


@pytest.mark.parametrize(
    ("tokens", "param"),
    [
        (None, "tokens"),
        ("abc", "tokens"),
        ([1, "a"], "tokens[1]"),
        ([True], "tokens[0]"),
        ([-1], "tokens[0]"),
        ([10**9], "tokens[0]"),
    ],
)
def test_what_is_wrong_with_ids_is_named(client, tokens, param):
    assert error_of(client.post("/detokenize", json={"tokens": tokens}), 400)["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_the_rules_of_every_endpoint_hold(make_client, path):
    client = make_client(api_keys=["alice: a"], key_limits={"alice": {"concurrent": 1}})
    body = {"prompt": "a"} if path == "/tokenize" else {"tokens": [1]}
    error_of(client.post(path, json=body), 401)
    headers = {"Authorization": "Bearer a"}
    assert client.post(path, json=body, headers=headers).status_code == 200
    error_of(client.get(path, headers=headers), 405)
    assert error_of(client.post(path, json={**body, "model": "x"}, headers=headers), 404)
    ignored = client.post(path, json={**body, "x": 1}, headers=headers)
    assert ignored.headers["x-moorage-ignored"] == "x"
    small = make_client(max_body=20)
    error_of(small.post(path, json={**body, "x": "y" * 50}), 413)
    error_of(make_client(state="loading").post(path, json=body), 503)
    error_of(make_client(unknown_fields="refuse").post(path, json={**body, "x": 1}), 400)


def test_the_model_says_how_long_it_is_and_what_it_can(client):
    model = client.get(f"/v1/models/{MODEL_ID}").get_json()
    assert model["max_model_len"] == model["context_length"] == 200
    assert model["capabilities"]["chat"] is True
    assert all(isinstance(value, bool) for value in model["capabilities"].values())
