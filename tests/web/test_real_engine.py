"""The two endpoints on the real engine with a tiny model."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from service.engine.engine import Engine
from service.engine.params import SamplingParams
from service.engine.runner import Runner
from service.errors import PlacementDrifted
from service.web.app import create_app
from tests.engine.scripted import Gate
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_deployment import fake_config
from tests.support.tiny import tiny_model
from tests.support.tiny import tiny_tokenizer
from tests.web.asking import CHAT
from tests.web.asking import COMPLETIONS
from tests.web.asking import chat_body
from tests.web.asking import completion_body
from tests.web.asking import error_of
from tests.web.asking import events

CONTEXT = 400
MODEL = tiny_model()


class Hold:
    """Where a test holds the steps of the engine: those from the next on wait at its gate."""

    gate: Gate | None = None

    def begin(self) -> Gate:
        self.gate = Gate()
        return self.gate

    def step(self) -> None:
        if self.gate is not None:
            self.gate(None)


@pytest.fixture
def hold() -> Hold:
    return Hold()


@pytest.fixture
def engine(hold: Hold) -> Iterator[Engine]:
    def place_inputs(model: object, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        hold.step()
        return dict(inputs)

    engine = Engine(Runner(MODEL, place_inputs, max_context=CONTEXT, max_sequences=4), max_queue=8)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def make_client(engine):
    def make(**server):
        serving = FakeServing(engine=engine, max_context=CONTEXT)
        return create_app(FakeDeployment(fake_config(**server), model=serving)).test_client()

    return make


def wait_until_idle(engine: Engine) -> None:
    while engine.stats().running or engine.stats().waiting:
        time.sleep(0.001)


def test_a_greedy_chat_is_what_generate_says_streamed_and_not(make_client):
    tokenizer = tiny_tokenizer()
    messages = chat_body()["messages"]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt"
    )
    # the same weights: the model of a running engine is the engine's alone
    ids = tiny_model().generate(**inputs, do_sample=False, max_new_tokens=40)[0]
    wanted = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    client = make_client()
    body = chat_body(temperature=0, max_tokens=40)
    answer = client.post(CHAT, json=body).get_json()
    assert answer["choices"][0]["message"]["content"] == wanted
    text = client.post(CHAT, json=body | {"stream": True}).get_data(as_text=True)
    deltas = [e["choices"][0]["delta"] for e in events(text)[:-1]]
    assert "".join(d.get("content", "") for d in deltas) == wanted


def test_a_seed_gives_the_same_answer_whatever_runs_beside_it(make_client):
    client = make_client()
    body = completion_body(prompt="abc", seed=7, max_tokens=20)
    alone = client.post(COMPLETIONS, json=body).get_json()["choices"][0]["text"]
    together = client.post(COMPLETIONS, json=body | {"prompt": ["x", "abc", "y"]}).get_json()
    assert together["choices"][1]["text"] == alone


def test_a_token_outside_the_vocabulary_is_400(make_client):
    response = make_client().post(COMPLETIONS, json=completion_body(prompt=[97, 258]))
    assert error_of(response, 400)["param"] == "prompt"


def test_more_prompts_than_the_queue_has_room_for_now_is_429(make_client, engine, hold):
    gate = hold.begin()
    long = SamplingParams(max_tokens=CONTEXT - 1)
    others = [engine.submit([97], long) for _ in range(6)]
    response = make_client().post(COMPLETIONS, json=completion_body(prompt=["a"] * 8))
    gate.open()
    error_of(response, 429)
    assert response.headers["Retry-After"].isdigit()
    for stream in others:
        stream.cancel()
    wait_until_idle(engine)


def test_a_deadline_that_passes_is_504(make_client):
    body = chat_body(max_tokens=CONTEXT - 50, ignore_eos=True)
    error = error_of(make_client(request_timeout_s=1e-6).post(CHAT, json=body), 504)
    assert error["code"] == "deadline_exceeded"


def test_a_stream_that_is_closed_frees_its_place_in_the_engine(make_client, engine):
    body = completion_body(stream=True, max_tokens=CONTEXT - 2, ignore_eos=True)
    response = make_client().post(COMPLETIONS, json=body)
    next(response.iter_encoded())
    response.close()
    wait_until_idle(engine)
    assert engine.stats().kv_tokens == 0


def test_a_blocking_request_whose_client_leaves_frees_its_place(
    make_client, engine, hold, monkeypatch
):
    monkeypatch.setattr("service.web.generation.TICK_S", 0.001)
    ours, theirs = socket.socketpair()
    gate = hold.begin()

    def leave_when_running() -> None:
        gate.wait_inside()
        theirs.close()

    leaver = threading.Thread(target=leave_when_running)
    leaver.start()
    body = completion_body(prompt=["a"] * 4, max_tokens=CONTEXT - 1, ignore_eos=True)
    response = make_client().post(
        COMPLETIONS, json=body, environ_overrides={"gunicorn.socket": ours}
    )
    gate.open()
    leaver.join()
    ours.close()
    assert response.status_code == 499
    wait_until_idle(engine)
    assert engine.stats().kv_tokens == 0


def test_a_stop_string_frees_the_place_of_its_sequence(make_client, engine):
    client = make_client()
    body = completion_body(temperature=0, max_tokens=60, ignore_eos=True)
    whole = client.post(COMPLETIONS, json=body).get_json()["choices"][0]["text"]
    stop = whole[10:13]
    answer = client.post(COMPLETIONS, json=body | {"stop": stop}).get_json()["choices"][0]
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"
    wait_until_idle(engine)


def test_a_model_that_changes_ends_a_stream_with_an_event_that_says_so(make_client, engine, hold):
    drift = PlacementDrifted(
        "the model changed while serving (F18): lm_head.weight was float32, is float16",
        failure_class="F18",
        tensors=["lm_head.weight"],
    )
    engine.look_with(lambda thorough: drift)
    gate = hold.begin()
    body = completion_body(stream=True, max_tokens=CONTEXT - 2, ignore_eos=True)
    response = make_client().post(COMPLETIONS, json=body)
    assert response.status_code == 200
    chunks = response.iter_encoded()
    gate.let_one_go()
    first = next(chunks)
    engine.inspect(0.0)
    gate.open()
    *_, last = events((first + b"".join(chunks)).decode())
    assert last["error"]["code"] == "placement_drifted"
    assert last["error"]["failure_class"] == "F18"
    assert last["error"]["tensors"] == ["lm_head.weight"]
    assert "was float32, is float16" in last["error"]["message"]


def test_a_model_that_changes_ends_a_blocking_request_with_503(make_client, engine, hold):
    def look(thorough: bool) -> PlacementDrifted:
        return PlacementDrifted("the model changed while serving")

    engine.look_with(look)
    gate = hold.begin()

    def look_when_running() -> None:
        gate.wait_inside()
        engine.inspect(0.0)
        gate.open()

    looker = threading.Thread(target=look_when_running)
    looker.start()
    body = completion_body(max_tokens=CONTEXT - 2, ignore_eos=True)
    response = make_client().post(COMPLETIONS, json=body)
    looker.join()
    assert error_of(response, 503)["code"] == "placement_drifted"
    assert response.headers["Retry-After"].isdigit()
