"""What the two endpoints answer when all is well, and what they pass to the engine."""

import time

import pytest

from service.errors import DeadlineExceeded
from service.errors import EngineStopped
from service.errors import Overloaded
from service.errors import RequestError
from service.web import generation
from service.web import sse
from tests.support.fake_deployment import MODEL_ID
from tests.support.tiny import IM_END
from tests.support.tiny import tiny_tokenizer
from tests.web.asking import CHAT
from tests.web.asking import COMPLETIONS
from tests.web.asking import body_for
from tests.web.asking import chat_body
from tests.web.asking import completion_body
from tests.web.asking import error_of
from tests.web.asking import events

BOTH = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


def test_a_chat_has_openais_shape(client, engine):
    response = client.post(CHAT, json=chat_body())
    assert response.status_code == 200
    body = response.get_json()
    assert body.pop("id").startswith("chatcmpl-")
    assert abs(body.pop("created") - time.time()) < 60
    prompt = len(engine.submissions[0].ids)
    assert body == {
        "object": "chat.completion",
        "model": MODEL_ID,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 5,
            "total_tokens": prompt + 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_completion_has_openais_shape(client):
    body = client.post(COMPLETIONS, json=completion_body()).get_json()
    assert body.pop("id").startswith("cmpl-")
    body.pop("created")
    assert body == {
        "object": "text_completion",
        "model": MODEL_ID,
        "choices": [{"text": "Hello", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 5,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_chat_stream_starts_with_the_role_and_ends_with_usage_and_done(client, engine):
    engine.answer = [*"Grüße 😀".encode(), IM_END]
    response = client.post(
        CHAT, json=chat_body(stream=True, stream_options={"include_usage": True})
    )
    assert response.status_code == 200
    assert response.mimetype == "text/event-stream"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert "no-store" in response.headers["Cache-Control"]
    *chunks, usage, done = events(response.get_data(as_text=True))
    assert done == "[DONE]"
    assert chunks[0]["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Grüße 😀"
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all(c["usage"] is None and c["object"] == "chat.completion.chunk" for c in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(engine.answer) - 1
    assert len({c["id"] for c in [*chunks, usage]}) == 1


def test_without_include_usage_no_chunk_speaks_of_usage(client):
    text = client.post(CHAT, json=chat_body(stream=True)).get_data(as_text=True)
    assert "usage" not in text


def test_continuous_usage_counts_in_every_chunk(client):
    options = {"continuous_usage_stats": True}
    text = client.post(CHAT, json=chat_body(stream=True, stream_options=options)).get_data(True)
    counts = [e["usage"]["completion_tokens"] for e in events(text)[:-1]]
    assert counts[0] == 0
    assert counts[-1] == 5
    assert counts == sorted(counts)


def test_a_completion_stream_has_text_then_a_reason(client):
    text = client.post(COMPLETIONS, json=completion_body(stream=True)).get_data(as_text=True)
    *chunks, done = events(text)
    assert done == "[DONE]"
    assert [c["choices"][0]["text"] for c in chunks] == ["Hello", ""]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, "stop"]
    assert all(c["object"] == "text_completion" for c in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_the_sequence(client, engine, stream):
    engine.answer = list(b"one two three")
    engine.hang = True
    response = client.post(
        COMPLETIONS, json=completion_body(stop=["two"], max_tokens=50, stream=stream)
    )
    if stream:
        parts = [e["choices"][0] for e in events(response.get_data(as_text=True))[:-1]]
        assert "".join(p["text"] for p in parts) == "one "
        assert parts[-1]["finish_reason"] == "stop"
    else:
        body = response.get_json()
        assert body["choices"][0]["text"] == "one "
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == len("one two")
    assert engine.submissions[0].stream.cancelled


def test_an_answer_at_its_limit_says_length(client):
    body = client.post(CHAT, json=chat_body(max_tokens=2)).get_json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["content"] == "He"


def test_the_templates_tokens_reach_the_engine(client, engine):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    client.post(CHAT, json=chat_body(messages=messages))
    wanted = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
    ids = tiny_tokenizer().apply_chat_template(wanted, add_generation_prompt=True)["input_ids"]
    assert engine.submissions[0].ids == ids


def test_an_earlier_answer_can_be_sent_back_as_it_was_received(client):
    answer = client.post(CHAT, json=chat_body()).get_json()["choices"][0]["message"]
    answer |= {"tool_calls": None, "annotations": [], "audio": None, "function_call": None}
    messages = [chat_body()["messages"][0], answer, {"role": "user", "content": "And?"}]
    response = client.post(CHAT, json=chat_body(messages=messages))
    assert response.status_code == 200
    assert "x-moorage-ignored" not in response.headers


def test_sampling_fields_reach_the_engine(client, engine):
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "seed": -3,
        "max_tokens": 9,
        "stop_token_ids": [5],
    }
    assert client.post(CHAT, json=chat_body(**fields)).status_code == 200
    params = engine.submissions[0].params
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 0.5, 7)
    assert (params.seed, params.max_tokens) == (-3, 9)
    assert params.stop_ids == {IM_END, 5}


def test_null_is_absent(client, engine):
    nothing = dict.fromkeys(
        ["temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "n", "tools"]
    )
    assert client.post(CHAT, json=chat_body(**nothing)).status_code == 200
    assert engine.submissions[0].params.temperature == 1.0


def test_what_the_publisher_recommends_holds_where_a_request_says_nothing(client, engine):
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.9}
    client.application.extensions["moorage"].model.defaults.update(defaults)
    client.post(CHAT, json=chat_body())
    client.post(CHAT, json=chat_body(temperature=0, top_k=0, top_p=1))
    default, own = (s.params for s in engine.submissions)
    assert (default.temperature, default.top_k, default.top_p) == (0.6, 20, 0.9)
    assert (own.temperature, own.top_k, own.top_p) == (0.0, 0, 1.0)


def test_top_k_of_minus_one_is_off_and_ignore_eos_ignores_the_end(client, engine):
    client.post(CHAT, json=chat_body(top_k=-1, ignore_eos=True))
    assert engine.submissions[0].params.top_k == 0
    assert engine.submissions[0].params.stop_ids == frozenset()


def test_a_chat_may_fill_the_context_and_a_completion_has_16_tokens(client, engine):
    client.post(CHAT, json=chat_body())
    client.post(COMPLETIONS, json=completion_body())
    chat, completion = engine.submissions
    assert chat.params.max_tokens == 200 - len(chat.ids)
    assert completion.params.max_tokens == 16


def test_max_completion_tokens_is_max_tokens(client, engine):
    client.post(CHAT, json=chat_body(max_completion_tokens=3, max_tokens=3))
    assert engine.submissions[0].params.max_tokens == 3


def test_the_deadline_is_the_request_timeout_from_now(make_client, engine):
    before = time.monotonic()
    make_client(request_timeout_s=50).post(CHAT, json=chat_body())
    assert before + 50 <= engine.submissions[0].deadline <= time.monotonic() + 50


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        (["a", "b"], [[97], [98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        ("a<|im_end|>", [[97, IM_END]]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_all_four_kinds(client, engine, prompt, ids, stream):
    response = client.post(COMPLETIONS, json=completion_body(prompt=prompt, stream=stream))
    assert [s.ids for s in engine.submissions] == ids
    if stream:
        *chunks, _ = events(response.get_data(as_text=True))
        texts = dict.fromkeys(range(len(ids)), "")
        for choice in (c["choices"][0] for c in chunks):
            texts[choice["index"]] += choice["text"]
        assert set(texts.values()) == {"Hello"}
    else:
        body = response.get_json()
        assert [c["index"] for c in body["choices"]] == list(range(len(ids)))
        assert body["usage"]["completion_tokens"] == 5 * len(ids)
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


# --- when the engine cannot


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_real_429_streams_too(client, engine, path, stream):
    engine.refuse = Overloaded("256 sequences wait", retry_after_s=3)
    response = client.post(path, json=body_for(path, stream=stream))
    assert error_of(response, 429)["code"] == "queue_full"
    assert response.headers["Retry-After"] == "3"


def test_all_prompts_of_a_request_are_submitted_at_once_or_none(client, engine):
    submit_all, calls = engine.submit_all, []

    def noted(prompts, deadline=None, **more):
        calls.append(len(prompts))
        return submit_all(prompts, deadline, **more)

    engine.submit_all = noted
    client.post(COMPLETIONS, json=completion_body(prompt=["a", "b"]))
    assert calls == [2]
    engine.refuse = Overloaded("full")
    error_of(client.post(COMPLETIONS, json=completion_body(prompt=["a", "b"])), 429)
    assert len(engine.submissions) == 2


@pytest.mark.parametrize(
    "error", [kind for kind in RequestError.__subclasses__() if kind.status in (429, 503)]
)
@BOTH
def test_who_is_to_come_back_is_told_when(client, engine, path, error):
    engine.refuse = error("not now")
    response = client.post(path, json=body_for(path))
    error_of(response, error.status)
    assert int(response.headers["Retry-After"]) >= 1


@BOTH
def test_a_deadline_is_504(client, engine, path):
    engine.fail = DeadlineExceeded("took longer than 600 s")
    error = error_of(client.post(path, json=body_for(path)), 504)
    assert error["code"] == "deadline_exceeded"


@BOTH
def test_an_error_in_a_stream_is_an_event_and_the_stream_does_not_look_complete(
    client, engine, path
):
    engine.fail = EngineStopped("gone")
    response = client.post(path, json=body_for(path, stream=True))
    assert response.status_code == 200
    last = events(response.get_data(as_text=True))[-1]
    assert last["error"]["code"] == "engine_stopped"
    assert set(last["error"]) >= {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_is_logged_and_not_shown(client, engine, caplog, stream):
    class Broken(Exception):
        pass

    def broken(*_: object, **__: object) -> None:
        raise Broken("/secret/path")

    client.application.extensions["moorage"].model.tokenizer.decode = broken
    response = client.post(CHAT, json=chat_body(stream=stream), headers={"X-Request-Id": "req-1"})
    if stream:
        error = events(response.get_data(as_text=True))[-1]["error"]
    else:
        error = error_of(response, 500)
    assert error["message"] == "internal error; request id req-1"
    assert "/secret/path" in caplog.text
    assert "req-1" in caplog.text
    assert engine.submissions[0].stream.cancelled


def test_a_stream_that_is_dropped_before_it_starts_is_cancelled(client, engine):
    engine.hang = True
    response = client.post(CHAT, json=chat_body(stream=True), buffered=False)
    response.close()
    assert engine.submissions[0].stream.cancelled


def test_comments_are_sent_while_nothing_comes(client, engine, monkeypatch):
    monkeypatch.setattr(sse, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(generation, "TICK_S", 0.001)
    engine.hang = True
    response = client.post(CHAT, json=chat_body(stream=True), buffered=False)
    seen = []
    for part in response.iter_encoded():
        seen.append(part)
        if part == sse.HEARTBEAT:
            break
    response.close()
    assert seen[0].startswith(b"data: ")
    assert seen[-1].startswith(b":")
