"""/openapi.json says what the app does. What it says of bodies and answers: test_conformance."""

import json
import re
from typing import Any

import jsonschema_rs
import pytest

from service import __version__
from service.errors import RequestError
from service.errors import ServiceError
from service.web import cors
from service.web import openapi
from service.web import routes
from service.web import schemas
from service.web import security
from service.web import shapes
from service.web import values
from service.web.app import create_app
from tests.support.fake_deployment import MODEL_ID
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import fake_config
from tests.web.asking import CHAT
from tests.web.asking import chat_body
from tests.web.asking import events

METHODS = {"get", "post", "delete", "put", "patch"}


def document(**config: Any) -> dict[str, Any]:
    app = create_app(FakeDeployment(fake_config(**config)))
    return openapi.document(app, keyed=bool(config.get("api_keys")), model=MODEL_ID)


DOCUMENT = document()
OPERATIONS = [
    (path, method)
    for path, item in DOCUMENT["paths"].items()
    for method in item
    if method in METHODS
]
EXAMPLES = [
    (path, name, example["value"])
    for path, item in DOCUMENT["paths"].items()
    for content in item.get("post", {}).get("requestBody", {}).get("content", {}).values()
    for name, example in content["examples"].items()
]


def validator(schema: Any) -> Any:
    return jsonschema_rs.Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def test_every_route_of_the_app_is_in_the_document():
    told = {(path, method.upper()) for path, method in OPERATIONS}
    app = create_app(FakeDeployment())
    there = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method)
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert told == there


def test_a_route_that_is_added_without_a_word_is_named():
    app = create_app(FakeDeployment())
    app.add_url_rule("/quietly", view_func=lambda: "", endpoint="quietly")
    with pytest.raises(LookupError, match="GET /quietly is in no document"):
        openapi.document(app, keyed=False, model=MODEL_ID)


def test_it_is_served_with_the_model_that_is_served(client, make_client):
    answer = client.get("/openapi.json")
    assert answer.content_type == "application/json"
    assert answer.get_json() == DOCUMENT
    assert client.get("/openapi.json").data == answer.data
    loading = make_client(state="loading").get("/openapi.json").get_json()
    assert loading["paths"].keys() == DOCUMENT["paths"].keys()
    assert MODEL_ID not in json.dumps(loading["paths"])


def test_it_is_the_version_that_it_says():
    assert DOCUMENT["openapi"] == "3.1.0"
    assert DOCUMENT["info"]["version"] == __version__


def test_every_reference_has_something_behind_it():
    found = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(DOCUMENT)))
    assert found
    assert found <= DOCUMENT["components"]["schemas"].keys()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_keys_are_asked_for_where_the_document_says_so(path, method):
    keyed = document(api_keys=["k"])["paths"][path][method]
    client = create_app(FakeDeployment(fake_config(api_keys=["k"]))).test_client()
    answer = client.open(re.sub(r"\{\w+\}", "x", path), method=method.upper())
    assert (answer.status_code == 401) == bool(keyed["security"])
    assert ("401" in keyed["responses"]) == bool(keyed["security"])
    assert DOCUMENT["paths"][path][method]["security"] == []


def test_what_needs_no_key_is_health_and_the_files_of_the_pages():
    item = document(api_keys=["k"])["paths"]
    free = {path for path, of in item.items() if any(not o["security"] for o in of.values())}
    pages = {path for path in item if path == "/docs" or path.startswith("/docs/")}
    assert free == {"/health", "/health/live", "/health/ready", "/", "/page/{name}"} | pages


@pytest.mark.parametrize(
    ("path", "name", "body"), EXAMPLES, ids=[f"{e[0]} {e[1]}" for e in EXAMPLES]
)
def test_every_example_is_what_its_schema_allows(path, name, body):
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    validator(content["schema"]).validate(body)


# What needs a real model to be answered is asked in test_conformance and test_embeddings.
PLAIN = [e for e in EXAMPLES if e[0] != "/v1/embeddings" and not e[2].get("echo")]


@pytest.mark.parametrize(("path", "name", "body"), PLAIN, ids=[f"{e[0]} {e[1]}" for e in PLAIN])
def test_every_example_is_answered(client, path, name, body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.get_data(as_text=True)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_errors_are_told_with_their_status_and_code(path, method):
    waiting: list[type[ServiceError]] = [RequestError]
    for kind in waiting:
        waiting += kind.__subclasses__()
    known = {(kind.status, kind.code) for kind in [ServiceError, *waiting]}
    for status, response in DOCUMENT["paths"][path][method]["responses"].items():
        if status == "200":
            continue
        schema = response["content"]["application/json"]["schema"]
        for code in schema["allOf"][1]["properties"]["error"]["properties"]["code"]["enum"]:
            assert (int(status), code) in known
        assert ("Retry-After" in response["headers"]) == (status in ("429", "503"))
        assert ("WWW-Authenticate" in response["headers"]) == (status == "401")


def test_every_header_that_pages_may_read_is_told():
    headers = DOCUMENT["paths"][CHAT]["post"]["responses"]["503"]["headers"]
    assert {name.lower() for name in headers} == set(cors.READABLE.split(", "))


def test_headers_of_requests_are_told_and_those_that_matter_are_checked(client):
    for path, method in OPERATIONS:
        told = {p["name"]: p for p in DOCUMENT["paths"][path][method]["parameters"]}
        assert {"X-Request-Id", security.TIMEOUT_HEADER} <= told.keys()
    schema = validator(told[security.TIMEOUT_HEADER]["schema"])
    for value in ("1", "0.5", "000.001", "0", "0.0", "000", "1e5", "-1", "", "1.", "01"):
        answer = client.get("/health/live", headers={security.TIMEOUT_HEADER: value})
        assert (answer.status_code == 200) == schema.is_valid(value), value


def test_every_event_of_a_stream_is_as_it_says(client):
    content = DOCUMENT["paths"][CHAT]["post"]["responses"]["200"]["content"]
    event = content["text/event-stream"]["schema"]
    inside = validator(event["properties"]["data"]["else"]["contentSchema"])
    options = {"include_usage": True}
    body = chat_body(stream=True, stream_options=options, logprobs=True, n=2)
    *chunks, done = events(client.post(CHAT, json=body).get_data(as_text=True))
    assert done == event["properties"]["data"]["if"]["const"]
    for chunk in chunks:
        inside.validate(chunk)
    assert not inside.is_valid({**chunks[0], "odd": 1})


@pytest.mark.parametrize(("shape", "model"), [(schemas.CHAT, schemas.ChatRequest)])
def test_every_field_that_is_done_is_in_the_shape(shape, model):
    assert set(shape.done) == set(model.model_fields)


def test_a_field_of_no_shape_is_a_mistake_of_ours():
    with pytest.raises(KeyError):
        values.Typed(schemas.ChatRequest, "odd").schema()


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        (shapes.Array(values.Text(), least=1, most=2), ["a"]),
        (shapes.Array(values.Text(), least=1, most=2), []),
        (shapes.Array(values.Text(), least=1, most=2), ["a", "b", "c"]),
        (shapes.Array(values.Text(), least=1, most=2), ["a", 1]),
        (values.Text(least=1, most=2), "ab"),
        (values.Text(least=1, most=2), ""),
        (values.Text(least=1, most=2), "abc"),
        (values.Text(pattern="[a-z]+"), "abc"),
        (values.Text(pattern="[a-z]+"), "abc\n"),
        (values.Text(pattern="[a-z]+"), "abc1"),
        (values.Choice(("a", "b")), "a"),
        (values.Choice(("a", "b")), "c"),
        (values.Only("a"), "b"),
        (values.Flag(), 1),
        (values.Flag(), True),
        (values.Number(-1, 1), True),
        (values.Number(-1, 1), 1),
        (values.Number(-1, 1), 1.01),
        (values.AnyObject(), []),
        (shapes.Ids(least=1), [1, 2]),
        (shapes.Ids(least=1), [1, "2"]),
        (shapes.Ids(least=1), [True]),
        (shapes.Table("[0-9]", "digit", values.Flag(), most=1), {"1": True}),
        (shapes.Table("[0-9]", "digit", values.Flag(), most=1), {"12": True}),
        (shapes.Table("[0-9]", "digit", values.Flag(), most=1), {"1": True, "2": True}),
        (shapes.Object({"a": values.Flag()}, ["a"]), {"a": True, "odd": 1}),
        (shapes.Object({"a": values.Flag()}, ["a"]), {"a": None}),
        (shapes.Object({"a": values.Flag()}), {"a": None}),
        (shapes.Object({"a": values.Flag()}), {"a": 1}),
        (shapes.Object({}, not_done={"a": (1,)}), {"a": 1}),
        (shapes.Object({}, not_done={"a": (1,)}), {"a": True}),
        (shapes.Object({}, not_done={"a": ()}), {"a": 0}),
        (shapes.Object({}, harmless={"a"}), {"a": [1]}),
        (shapes.Either((values.Text(), shapes.Ids()), wanted="x"), [1]),
        (shapes.Either((values.Text(), shapes.Ids()), wanted="x"), 1),
        (shapes.Either((values.Text(), shapes.Ids()), wanted="x"), ["a"]),
        (schemas.MESSAGES, [{"role": "assistant", "content": None}]),
        (schemas.MESSAGES, [{"role": "user", "content": "a", "tool_calls": []}]),
        (schemas.MESSAGES, [{"role": "user", "content": "a", "tool_calls": None}]),
    ],
)
def test_a_shape_takes_what_its_schema_takes(shape, value):
    try:
        shape.check("it", value, [])
    except RequestError:
        taken = False
    else:
        taken = True
    assert jsonschema_rs.is_valid(shape.schema(), value) == taken


def test_operations_are_known_by_their_views():
    app = create_app(FakeDeployment())
    assert set(routes.operations(app)) == {rule.endpoint for rule in app.url_map.iter_rules()}
