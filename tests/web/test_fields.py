"""Every field of OpenAI's specification is done, harmless or refused; what is done acts."""

from typing import Any

import pytest
from openai.types import completion_create_params as of_completions
from openai.types.chat import completion_create_params as of_chats

from service.engine.params import SamplingParams
from service.web import fields
from service.web import generation
from service.web import schemas
from tests.support.fake_engine import FakeEngine
from tests.support.tiny import IM_END
from tests.web.asking import CHAT
from tests.web.asking import COMPLETIONS
from tests.web.asking import body_for
from tests.web.asking import error_of
from tests.web.asking import events

OFFICIAL = [
    *((CHAT, name) for name in of_chats.CompletionCreateParamsBase.__annotations__),
    *((COMPLETIONS, name) for name in of_completions.CompletionCreateParamsBase.__annotations__),
]
KNOWN = {
    CHAT: {*schemas.CHAT_DONE, *fields.HARMLESS, *fields.CHAT_NOT_DONE},
    COMPLETIONS: {*schemas.COMPLETION_DONE, *fields.HARMLESS, *fields.COMPLETION_NOT_DONE},
}
# what a field that reaches the engine becomes there
REACH: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (3, {"top_k": 3}),
    "min_p": (0.5, {"min_p": 0.5}),
    "repetition_penalty": (1.5, {"repetition_penalty": 1.5}),
    "presence_penalty": (-1, {"presence_penalty": -1.0}),
    "frequency_penalty": (2, {"frequency_penalty": 2.0}),
    "logit_bias": ({"5": 1, "7": -100}, {"logit_bias": ((5, 1.0), (7, -100.0))}),
    "seed": (4, {"seed": 4}),
    "min_tokens": (3, {"min_tokens": 3}),
    "max_tokens": (7, {"max_tokens": 7}),
    "max_completion_tokens": (7, {"max_tokens": 7}),
    "ignore_eos": (True, {"stop_ids": frozenset()}),
    "stop_token_ids": ([9], {"stop_ids": frozenset({IM_END, 9})}),
    "logprobs": (None, {}),  # differs: below
}
# what has an effect elsewhere, with the tests that show it
ELSEWHERE = {
    "model": "test_refusals",
    "messages": "test_answers",
    "prompt": "test_answers",
    "stream": "test_answers",
    "stream_options": "test_answers",
    "stop": "test_answers",
    "n": "here",
    "best_of": "test_refusals",
    "echo": "test_logprobs",
    "top_logprobs": "test_logprobs",
    "parallel_tool_calls": "test_tools",
    "response_format": "test_tools",
    "tool_choice": "test_tools",
    "tools": "test_tools",
}


@pytest.mark.parametrize(("path", "name"), OFFICIAL)
def test_every_official_field_is_known(path, name):
    assert name in KNOWN[path]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_no_field_is_in_two_tables(path):
    done, table = schemas.CHAT_DONE, fields.CHAT_NOT_DONE
    if path == COMPLETIONS:
        done, table = schemas.COMPLETION_DONE, fields.COMPLETION_NOT_DONE
    assert not done & fields.HARMLESS
    assert not set(table) & (done | fields.HARMLESS)


def test_every_field_that_is_done_is_tested():
    done = schemas.CHAT_DONE | schemas.COMPLETION_DONE
    assert done <= {*REACH, *ELSEWHERE}


REACHING = [
    (path, name)
    for path, done in ((CHAT, schemas.CHAT_DONE), (COMPLETIONS, schemas.COMPLETION_DONE))
    for name in sorted(done & REACH.keys())
]


@pytest.mark.parametrize(("path", "name"), REACHING)
def test_a_field_that_is_done_reaches_the_engine(client, engine, path, name):
    value, wanted = REACH[name]
    if name == "logprobs":
        value, wanted = (True, {"logprobs": 0}) if path == CHAT else (3, {"logprobs": 3})
    response = client.post(path, json=body_for(path, **{name: value}))
    assert response.status_code == 200, response.get_data(as_text=True)
    params = engine.submissions[0].params
    assert {key: getattr(params, key) for key in wanted} == wanted
    # and nothing else changes
    plain = client.post(path, json=body_for(path))
    assert plain.status_code == 200
    default = engine.submissions[1].params
    for key in SamplingParams.__dataclass_fields__:
        if key not in wanted:
            assert getattr(params, key) == getattr(default, key), key


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_n_answers_each_have_their_index_and_share_the_prompt(client, engine, path, stream):
    options = {"stream_options": {"continuous_usage_stats": True}} if stream else {}
    response = client.post(path, json=body_for(path, n=3, stream=stream, **options))
    assert len(engine.submissions) == 3
    assert len({tuple(s.ids) for s in engine.submissions}) == 1
    prompt = len(engine.submissions[0].ids)
    if stream:
        *chunks, _ = events(response.get_data(as_text=True))
        ends = [c["choices"][0] for c in chunks if c["choices"][0]["finish_reason"]]
        assert sorted(end["index"] for end in ends) == [0, 1, 2]
        usage = chunks[-1]["usage"]
    else:
        body = response.get_json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, 15)


def test_choices_of_several_prompts_come_prompt_by_prompt(client, engine):
    body = body_for(COMPLETIONS, prompt=["a", "b"], n=2, best_of=2)
    choices = client.post(COMPLETIONS, json=body).get_json()["choices"]
    assert [submission.ids for submission in engine.submissions] == [[97], [97], [98], [98]]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "param"), [({"n": 5}, "n"), ({"prompt": ["a"] * 5}, "prompt"), ({"n": 2}, "n")]
)
def test_more_answers_than_the_server_ever_takes_are_refused(make_client, engine, changes, param):
    client = make_client(max_sequences=1, max_queue=3)
    body = body_for(COMPLETIONS, prompt=["a", "b", "c"]) | changes
    assert error_of(client.post(COMPLETIONS, json=body), 400)["param"] == param
    assert not engine.submissions


def test_what_was_found_computed_is_told(client, engine: FakeEngine):
    submit_all = engine.submit_all

    def found(*given, **more):
        streams = submit_all(*given, **more)
        for at, stream in enumerate(streams):
            stream.cached_tokens = 1 + at
        return streams

    engine.submit_all = found
    body = body_for(COMPLETIONS, prompt=["ab", "cd"], n=2)
    usage = client.post(COMPLETIONS, json=body).get_json()["usage"]
    assert usage["prompt_tokens"] == 4
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1 + 3}


def test_publishers_penalties_hold_where_a_request_says_nothing(client, engine):
    model = client.application.extensions["moorage"].model
    model.defaults.update({"min_p": 0.05, "repetition_penalty": 1.1})
    client.post(CHAT, json=body_for(CHAT))
    client.post(CHAT, json=body_for(CHAT, min_p=0, repetition_penalty=1))
    default, own = (submission.params for submission in engine.submissions)
    assert (default.min_p, default.repetition_penalty) == (0.05, 1.1)
    assert (own.min_p, own.repetition_penalty) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        (CHAT, {"n": 100, "max_tokens": 100, "logprobs": True, "top_logprobs": 20}),
        (COMPLETIONS, {"prompt": ["x" * 150] * 100, "logprobs": 20, "echo": True}),
    ],
)
def test_no_request_makes_the_server_remember_endless_logprobs(
    client, engine, monkeypatch, path, changes
):
    monkeypatch.setattr(generation, "MAX_TOLD", 200_000)
    error = error_of(client.post(path, json=body_for(path, **changes)), 400)
    assert error["param"] == "logprobs"
    assert not engine.submissions
    fewer = {name: value for name, value in changes.items() if "logprobs" not in name}
    assert client.post(path, json=body_for(path, **fewer)).status_code == 200


def test_top_logprobs_need_logprobs(client):
    error = error_of(client.post(CHAT, json=body_for(CHAT, top_logprobs=2)), 400)
    assert error["param"] == "top_logprobs"


@pytest.mark.parametrize(("path", "changes"), [(CHAT, {}), (COMPLETIONS, {}), (CHAT, {"n": 2})])
def test_no_tokens_at_all_need_an_echo(client, path, changes):
    response = client.post(path, json=body_for(path, max_tokens=0, **changes))
    assert error_of(response, 400)["param"] == "max_tokens"


def test_a_prompt_that_fills_the_context_can_be_echoed_and_nothing_more(client, engine):
    full = body_for(COMPLETIONS, prompt=[97] * 200, echo=True)
    assert client.post(COMPLETIONS, json=full | {"max_tokens": 0}).status_code == 200
    assert engine.submissions[0].params.prompt_logprobs == 0
    error = error_of(client.post(COMPLETIONS, json=full | {"max_tokens": 1}), 400)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses", "/v1/embeddings"])
@pytest.mark.parametrize(
    ("inner", "value"), [("prewarm", True), ("prewarm", 1), ("comparison_response_id", "resp_1")]
)
def test_what_would_change_the_answer_is_refused_inside_a_harmless_field(
    client, engine, path, inner, value
):
    body = body_for(path)
    if path not in (CHAT, COMPLETIONS):
        body = {"model": body["model"], "input": "a"}
    body["prompt_cache_options"] = {"mode": "implicit", inner: value}
    error = error_of(client.post(path, json=body), 400)
    assert error["param"] == f"prompt_cache_options.{inner}"
    assert not engine.submissions


@pytest.mark.parametrize(
    "value", [{}, None, {"prewarm": False, "mode": "explicit"}, {"prewarm": None, "ttl": "12h"}]
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_harmless_field_without_it_has_no_effect(client, path, value):
    response = client.post(path, json=body_for(path, prompt_cache_options=value))
    assert response.status_code == 200
    assert "x-moorage-ignored" not in response.headers
