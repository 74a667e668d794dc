"""Health, keys, headers, places, and clients that leave."""

import socket
import threading
import time

import pytest

from service.errors import PlacementDrifted
from service.web import generation
from service.web.admission import KEPT_FOR_HEALTH
from service.web.admission import Slots
from service.web.admission import client_gone
from service.web.app import create_app
from tests.support.fake_deployment import MODEL_ID
from tests.support.fake_deployment import FakeDeployment
from tests.web.asking import CHAT
from tests.web.asking import COMPLETIONS
from tests.web.asking import body_for
from tests.web.asking import chat_body
from tests.web.asking import completion_body
from tests.web.asking import error_of
from tests.web.asking import events

# --- health, placement, models


def test_a_ready_server_says_so(client):
    assert client.get("/health/live").get_json() == {"status": "live"}
    assert client.get("/health/ready").get_json() == {
        "status": "ready",
        "state": "ready",
        "model": MODEL_ID,
    }
    assert client.get("/placement").get_json()["state"] == "ready"


@pytest.mark.parametrize("state", ["ready", "loading", "draining", "failed"])
def test_health_alone_is_vllms_name_of_readiness(make_client, state):
    client = make_client(state=state, progress=0.63)
    answer, known = client.get("/health"), client.get("/health/ready")
    assert (answer.status_code, answer.get_json()) == (known.status_code, known.get_json())
    assert answer.status_code == (200 if state == "ready" else 503)
    assert answer.headers.get("Retry-After") == known.headers.get("Retry-After")


@pytest.mark.parametrize("state", ["planned", "loading", "validating", "draining", "failed"])
def test_until_it_is_ready_it_says_how_far_it_is_and_when_to_come_back(make_client, state):
    client = make_client(state=state, progress=0.63)
    assert client.get("/health/live").status_code == 200
    assert client.get("/placement").get_json()["progress"] == 0.63
    ready = client.get("/health/ready")
    assert error_of(ready, 503)["code"] == "not_ready"
    assert (ready.get_json()["state"], ready.get_json()["progress"]) == (state, 0.63)
    assert ready.headers["Retry-After"] == "7"
    for path in (CHAT, COMPLETIONS):
        response = client.post(path, json=body_for(path))
        assert "63%" in error_of(response, 503)["message"]
        assert response.headers["Retry-After"] == "7"
    error_of(client.get("/v1/models"), 503)


def test_a_model_that_changed_is_not_ready_and_says_what_changed():
    drift = PlacementDrifted("lm_head.weight was float32, is float16", failure_class="F18")
    client = create_app(FakeDeployment(state="degraded", drift=drift)).test_client()
    ready = client.get("/health/ready")
    error = error_of(ready, 503)
    assert (error["code"], error["failure_class"]) == ("placement_drifted", "F18")
    assert "was float32, is float16" in error["message"]
    assert ready.get_json()["state"] == "degraded"
    assert ready.headers["Retry-After"].isdigit()
    for path in (CHAT, COMPLETIONS):
        response = client.post(path, json=body_for(path))
        assert error_of(response, 503)["code"] == "placement_drifted"


def test_models_lists_the_one_that_is_served(client):
    model = client.get("/v1/models").get_json()
    assert model["object"] == "list"
    assert [m["id"] for m in model["data"]] == [MODEL_ID]
    assert client.get(f"/v1/models/{MODEL_ID}").get_json() == model["data"][0]
    assert model["data"][0]["max_model_len"] == 200


@pytest.mark.parametrize("name", ["other", "../../etc/passwd", "a/b/c"])
def test_another_model_is_404(client, name):
    assert error_of(client.get(f"/v1/models/{name}"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    "path", ["/page", "/v1", "/v1/chat", "/v1/models/", "//health/live", "/favicon.ico", "/%ff%00"]
)
def test_an_unknown_path_is_404_in_json(client, path):
    found = client.get(path, headers={"Host": "localhost"})  # or //health would be the host
    assert error_of(found, 404)["code"] == "not_found"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_a_wrong_method_is_405_in_json_and_names_the_right_one(client, method):
    response = client.open(CHAT, method=method)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["Allow"] == "POST"


def test_posting_to_health_is_405(client):
    error_of(client.post("/health/live"), 405)


# --- headers


@pytest.mark.parametrize("path", ["/health/live", "/nowhere", "/v1/models"])
def test_every_answer_has_an_id_and_the_common_headers(client, path):
    headers = client.get(path).headers
    assert len(headers["x-request-id"]) == 32
    assert headers["openai-processing-ms"].isdigit()
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("given", ["abc-1.2_3", "x" * 128])
def test_a_proper_request_id_comes_back(client, given):
    headers = {"X-Request-Id": given}
    assert client.get("/health/live", headers=headers).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "ä", "<script>", "a\x7f"])
def test_an_odd_request_id_is_replaced(client, given):
    headers = {"X-Request-Id": given}
    assert client.get("/health/live", headers=headers).headers["x-request-id"] != given


def test_a_request_without_a_host_is_400(client):
    environ = {"HTTP_HOST": "", "SERVER_PROTOCOL": "HTTP/1.1"}
    assert "Host" in error_of(client.get("/v1/models", environ_overrides=environ), 400)["message"]


# --- keys


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_with_keys_everything_but_health_needs_one(make_client):
    client = make_client(api_keys=["first", "sécond"])
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 200
    for path in ("/v1/models", f"/v1/models/{MODEL_ID}", "/placement", "/health/live/x"):
        response = client.get(path)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert client.get(path, headers=bearer("first")).status_code in (200, 404)
    error_of(client.post(CHAT, json=chat_body()), 401)
    assert client.post(CHAT, json=chat_body(), headers=bearer("first")).status_code == 200


def test_every_configured_key_works_and_no_other(make_client):
    client = make_client(api_keys=["first", "sécond"])
    as_wsgi_sees_it = "sécond".encode().decode("latin-1")
    for key, status in [("first", 200), (as_wsgi_sees_it, 200), ("firs", 401), ("first2", 401)]:
        environ = {"HTTP_AUTHORIZATION": f"Bearer {key}"}
        assert client.get("/v1/models", environ_overrides=environ).status_code == status


@pytest.mark.parametrize("value", ["first", "Basic first", "Bearer", "Bearer  ", "bearer x"])
def test_other_ways_to_authorise_are_refused(make_client, value, caplog):
    client = make_client(api_keys=["first"])
    response = client.get("/v1/models", headers={"Authorization": value})
    error_of(response, 401)
    assert "first" not in caplog.text
    assert "first" not in response.get_data(as_text=True)


def test_the_key_is_asked_before_the_body_is_read(make_client):
    class Unreadable:
        def read(self, size: int = -1) -> bytes:
            raise AssertionError("the body was read")

    client = make_client(api_keys=["k"])
    environ = {"wsgi.input": Unreadable(), "CONTENT_LENGTH": "10"}
    error_of(client.post(CHAT, environ_overrides=environ), 401)


# --- places


def test_eight_threads_are_kept_for_health_and_the_rest_gets_429(make_client, engine):
    engine.hang = True
    client = make_client(threads=KEPT_FOR_HEALTH + 2)
    open_streams = [client.post(CHAT, json=chat_body(stream=True)) for _ in range(2)]
    response = client.post(CHAT, json=chat_body())
    assert "2 requests" in error_of(response, 429)["message"]
    assert response.headers["Retry-After"] == "1"
    assert client.get("/health/ready").status_code == 200
    open_streams[0].close()
    engine.hang = False
    assert client.post(CHAT, json=chat_body()).status_code == 200
    open_streams[1].close()


def test_a_request_that_fails_gives_its_place_back(make_client, engine):
    client = make_client(threads=KEPT_FOR_HEALTH + 1)
    for _ in range(3):
        error_of(client.post(CHAT, json=chat_body(n=0)), 400)
        response = client.post(CHAT, json=chat_body(stream=True))
        assert response.status_code == 200
        response.close()
        assert client.post(CHAT, json=chat_body()).status_code == 200


def test_a_place_is_given_back_once():
    slots = Slots(KEPT_FOR_HEALTH + 1)
    slot = slots.take()
    slot.release()
    slot.release()
    slots.take()


# --- clients that leave


@pytest.fixture
def connection():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_client_that_is_there_or_talks_on_is_not_gone(connection):
    ours, theirs = connection
    assert not client_gone({"gunicorn.socket": ours})
    theirs.send(b"GET")
    assert not client_gone({"gunicorn.socket": ours})
    assert ours.recv(3) == b"GET"
    assert not client_gone({})


def test_a_client_that_closed_is_gone(connection):
    ours, theirs = connection
    theirs.close()
    assert client_gone({"gunicorn.socket": ours})
    ours.close()
    assert client_gone({"gunicorn.socket": ours})


def test_bytes_left_behind_do_not_hide_that_the_client_is_gone(connection):
    ours, theirs = connection
    theirs.send(b"more")
    theirs.close()
    assert client_gone({"gunicorn.socket": ours})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_when_the_client_leaves_the_sequence_is_cancelled(
    client, engine, connection, monkeypatch, path, stream
):
    monkeypatch.setattr(generation, "TICK_S", 0.001)
    ours, theirs = connection
    engine.hang = True
    theirs.close()
    environ = {"gunicorn.socket": ours}
    response = client.post(path, json=body_for(path, stream=stream), environ_overrides=environ)
    if stream:
        assert "[DONE]" not in events(response.get_data(as_text=True))
    else:
        assert response.status_code == 499
    assert engine.submissions[0].stream.cancelled


def test_a_client_that_leaves_while_it_waits_in_the_queue_is_noticed(
    client, engine, connection, monkeypatch
):
    monkeypatch.setattr(generation, "TICK_S", 0.001)
    engine.answer, engine.hang = (), True  # queued: not one token
    ours, theirs = connection

    def leave_once_queued() -> None:
        while not engine.submissions:
            time.sleep(0.001)
        theirs.close()

    leaver = threading.Thread(target=leave_once_queued)
    leaver.start()
    body = completion_body(prompt=["a", "b"])
    response = client.post(COMPLETIONS, json=body, environ_overrides={"gunicorn.socket": ours})
    leaver.join()
    assert response.status_code == 499
    assert all(s.stream.cancelled for s in engine.submissions)
