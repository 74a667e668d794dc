"""No error tells a client where anything lies on this machine, however it came about."""

import logging
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import service
from service.errors import EngineStopped
from service.errors import PlacementDrifted
from service.errors import ServiceError
from service.errors import StepFailed
from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_deployment import fake_config
from tests.support.fake_engine import FakeEngine
from tests.support.tiny import tiny_tokenizer
from tests.web.asking import CHAT
from tests.web.asking import COMPLETIONS
from tests.web.asking import chat_body
from tests.web.asking import completion_body

SECRET_PLACE = "/srv/models/secret/model.safetensors"
PLACES = {
    SECRET_PLACE,
    str(Path(service.__file__).resolve().parents[1]),
    str(Path.home()) if str(Path.home()) != "/" else SECRET_PLACE,
    sys.prefix,
    sys.base_prefix,
    tempfile.gettempdir(),
    str(Path.cwd()),
}
LOOKS_LIKE_ONE = re.compile(
    r'(?<![\w.:/])/(?:usr|home|root|srv|tmp|opt|etc|var|dev|proc|mnt|lib|work)\b|File \\?"|\.py\b'
)

SCHEMAS: list[Any] = [
    {"$ref": "file:///secret"},
    {"$ref": "http://127.0.0.1:1/secret"},
    {"$ref": "other.json"},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "^(?=a)$"},
    {"type": 5},
]
PARTS: list[Any] = [
    {"type": "image_url", "image_url": {"url": "file:///secret"}},
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/secret"}},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    {"type": "file", "file": {"file_id": "../secret"}},
    {"type": "text"},
    5,
]
WRONG: list[dict[str, Any]] = [
    {"model": "../../secret"},
    {"messages": []},
    {"messages": "x"},
    {"messages": [{"role": "nobody", "content": "x"}]},
    {"messages": [{"role": "user", "content": "<|im_end|>"}]},
    {"messages": [{"role": "user", "content": "x" * 20_000}]},
    {"temperature": 9},
    {"n": 10**6},
    {"max_tokens": 10**6},
    {"stop": ["x"] * 99},
    {"chat_template": "{{ x }}"},
    {"tools": [{"type": "function", "function": {"name": "../x"}}]},
    {"audio": {"voice": "x", "format": "wav"}},
    *({"messages": [{"role": "user", "content": [part]}]} for part in PARTS),
    *(
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": s}}}
        for s in SCHEMAS
    ),
]


def refused(response: Any) -> None:
    """The answer is an error without a place in it."""
    text = response.get_data(as_text=True)
    headers = "\n".join(f"{name}: {value}" for name, value in response.headers)
    assert '"error"' in text, text
    assert "Traceback" not in text
    for place in PLACES:
        assert place not in text + headers
    found = LOOKS_LIKE_ONE.search(text) or LOOKS_LIKE_ONE.search(headers)
    assert found is None, text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_with_a_request_is_told_without_a_path(make_client, fields, stream):
    with make_client().post(CHAT, json=chat_body(stream=stream, **fields)) as response:
        assert response.status_code in (400, 404), response.get_data(as_text=True)
        refused(response)


@pytest.mark.parametrize(
    ("method", "path", "data"),
    [
        ("GET", "/etc/passwd", None),
        ("GET", "/v1/models/../../secret", None),
        ("GET", "/v1/models/..%2f..%2fsecret", None),
        ("GET", "/static/app.py%00", None),
        ("DELETE", "/v1/models/x", None),
        ("PUT", CHAT, b"{}"),
        ("POST", CHAT, b"{"),
        ("POST", CHAT, b"\xff"),
        ("POST", CHAT, b"[]"),
        ("POST", CHAT, b"[" * 5000),
        ("POST", CHAT, b""),
        ("POST", COMPLETIONS, b'{"prompt": "\\ud800"}'),
        ("POST", "/tokenize", b'{"messages": 5}'),
        ("POST", "/detokenize", b'{"tokens": [99999999]}'),
    ],
)
def test_what_is_no_request_is_told_without_a_path(client, method, path, data):
    response = client.open(path, method=method, data=data, content_type="application/json")
    text = response.get_data(as_text=True).replace("there is nothing at", "")
    assert response.status_code >= 400
    for place in PLACES - {"/tmp", "/root"}:  # what the client sent is its own
        assert place not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file", SECRET_PLACE),
        RuntimeError(f"cannot map {SECRET_PLACE}"),
        MemoryError(SECRET_PLACE),
        KeyError(SECRET_PLACE),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, SECRET_PLACE),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_nobody_expected_is_an_id(make_client, engine, monkeypatch, caplog, error, stream):
    caplog.set_level(logging.CRITICAL)

    def broken(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(engine, "submit_all", broken)
    with make_client().post(CHAT, json=chat_body(stream=stream)) as response:
        assert response.status_code == 500
        refused(response)


class Faulty:
    """A tokenizer that raises wherever it is asked to work."""

    def __init__(self) -> None:
        self._real = tiny_tokenizer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise OSError(2, "No such file", SECRET_PLACE)

    def decode(self, *_: Any, **__: Any) -> Any:
        raise OSError(2, "No such file", SECRET_PLACE)


@pytest.mark.parametrize("body", [completion_body(), completion_body(prompt=[97])])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tokenizer_that_breaks_is_an_id(body, stream):
    app = create_app(FakeDeployment(model=FakeServing(tokenizer=Faulty())))
    with app.test_client().post(COMPLETIONS, json=body | {"stream": stream}) as response:
        refused(response)


@pytest.mark.parametrize(
    "template",
    ["{{ messages.x.y }}", "{% include '/etc/passwd' %}", "{% import 'x' as y %}", "{{ 1 // 0 }}"],
)
def test_a_template_that_breaks_is_told_without_a_path(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    app = create_app(FakeDeployment(model=FakeServing(tokenizer=tokenizer)))
    response = app.test_client().post(CHAT, json=chat_body())
    assert response.status_code == 400
    refused(response)


@pytest.mark.parametrize(
    "error",
    [
        StepFailed("a step failed"),
        EngineStopped("The engine has stopped after an error."),
        PlacementDrifted("lm_head.weight was cast", failure_class="F18"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_is_told_without_a_path(make_client, engine, error, stream):
    engine.fail = error
    with make_client().post(CHAT, json=chat_body(stream=stream)) as response:
        refused(response)


@pytest.mark.parametrize("state", ["planned", "loading", "validating", "draining", "failed"])
@pytest.mark.parametrize("path", ["/health/ready", "/v1/models", CHAT])
def test_a_model_that_is_not_there_is_told_without_a_path(state, path):
    app = create_app(FakeDeployment(state=state))
    method = "POST" if path == CHAT else "GET"
    json = chat_body() if path == CHAT else None
    response = app.test_client().open(path, method=method, json=json)
    assert response.status_code == 503
    refused(response)


def test_a_key_that_is_wrong_is_told_without_a_path_or_itself():
    config = fake_config(api_keys=["alice: sk-right"])
    app = create_app(FakeDeployment(config, model=FakeServing(engine=FakeEngine())))
    for given in ("Bearer sk-wrong", "Basic sk-wrong", "sk-wrong"):
        response = app.test_client().post(CHAT, json={}, headers={"Authorization": given})
        assert response.status_code == 401
        refused(response)
        assert "sk-" not in response.get_data(as_text=True)


def test_the_check_would_see_a_path():
    with pytest.raises(AssertionError):
        refused(_told(ServiceError(f"cannot read {SECRET_PLACE}")))
    with pytest.raises(AssertionError):
        refused(_told(ServiceError("cannot read /opt/model")))


def _told(error: ServiceError) -> Any:
    from service.web.failures import error_response

    with create_app(FakeDeployment()).test_request_context():
        return error_response(error)
