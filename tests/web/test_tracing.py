"""Spans of requests: over the whole answer, with numbers and names only."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from service.config.origin import Origin
from service.config.schema import Config
from service.errors import ConfigError
from service.errors import StepFailed
from service.web import generation
from service.web import tracing
from service.web.app import create_app
from service.web.tracing import Tracing
from tests.support.fake_deployment import MODEL_ID
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_deployment import fake_config
from tests.support.fake_engine import FakeEngine
from tests.web.asking import CHAT
from tests.web.asking import COMPLETIONS
from tests.web.asking import body_for
from tests.web.asking import chat_body

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def make_traced(engine: FakeEngine, exporter: InMemorySpanExporter) -> Callable[..., FlaskClient]:
    def make(**config: Any) -> FlaskClient:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        deployment = FakeDeployment(fake_config(**config), model=FakeServing(engine=engine))
        return create_app(deployment, Tracing(provider)).test_client()

    return make


def spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """By name, the request's own as "request"."""
    found = exporter.get_finished_spans()
    return {"request" if " " in span.name else span.name: span for span in found}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span_with_its_phases_inside(
    make_traced, exporter, engine, caplog, path, stream
):
    caplog.set_level(logging.INFO)
    client = make_traced(api_keys=["alice: secret-key"])
    headers = {"Authorization": "Bearer secret-key", "X-Request-Id": "mine"}
    response = client.post(path, json=body_for(path, stream=stream), headers=headers)
    if stream:
        assert exporter.get_finished_spans() == ()
    response.get_data()
    response.close()
    found = spans(exporter)
    assert sorted(found) == ["decode", "prefill", "queue", "request"]
    span = found["request"]
    assert span.name == f"POST {path}"
    told = dict(span.attributes or {})
    assert told.pop("gen_ai.latency.time_in_queue") >= 0
    first = told.pop("gen_ai.latency.time_to_first_token")
    assert 0 <= first <= told.pop("gen_ai.latency.e2e")
    assert told == {
        "http.request.method": "POST",
        "http.route": path,
        "http.response.status_code": 200,
        "gen_ai.request.id": "mine",
        "moorage.key": "alice",
        "gen_ai.provider.name": "moorage",
        "gen_ai.operation.name": "chat" if path == CHAT else "text_completion",
        "gen_ai.request.model": MODEL_ID,
        "gen_ai.response.model": MODEL_ID,
        "gen_ai.usage.input_tokens": len(engine.submissions[0].ids),
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert span.status.status_code == StatusCode.UNSET
    own = span.get_span_context()
    assert own is not None
    for name in ("queue", "prefill", "decode"):
        child = found[name]
        assert child.parent is not None
        assert child.parent.span_id == own.span_id
        assert not child.attributes
        assert child.start_time is not None
        assert child.end_time is not None
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= child.start_time <= child.end_time <= span.end_time
    lines = [r.fields for r in caplog.records if r.name == "moorage.access"]
    assert [line["trace_id"] for line in lines] == [f"{own.trace_id:032x}"]


def test_the_clients_trace_goes_on(make_traced, exporter, caplog):
    caplog.set_level(logging.INFO)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    make_traced().post(CHAT, json=chat_body(), headers=headers).close()
    span = spans(exporter)["request"]
    context = span.get_span_context()
    assert context is not None
    assert f"{context.trace_id:032x}" == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT
    assert context.trace_state.get("vendor") == "1"
    assert [r.fields["trace_id"] for r in caplog.records if r.name == "moorage.access"] == [TRACE]


def test_a_client_that_does_not_sample_is_followed_and_its_trace_still_named(
    make_traced, exporter, caplog
):
    caplog.set_level(logging.INFO)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    make_traced().post(CHAT, json=chat_body(), headers=headers).close()
    assert exporter.get_finished_spans() == ()
    assert [r.fields["trace_id"] for r in caplog.records if r.name == "moorage.access"] == [TRACE]


def test_without_tracing_the_clients_trace_is_in_the_line(client, caplog):
    caplog.set_level(logging.INFO)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    client.post(CHAT, json=chat_body(), headers=headers).close()
    assert [r.fields["trace_id"] for r in caplog.records if r.name == "moorage.access"] == [TRACE]


@pytest.mark.parametrize(
    "odd",
    ["x", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01\tkey=eve"],
)
def test_an_odd_traceparent_is_no_trace(client, caplog, odd):
    caplog.set_level(logging.INFO)
    client.post(CHAT, json=chat_body(), headers={"traceparent": odd}).close()
    (line,) = [r.fields for r in caplog.records if r.name == "moorage.access"]
    assert "trace_id" not in line


def test_no_text_of_prompt_answer_or_key_is_in_a_span(make_traced, exporter):
    client = make_traced(api_keys=["secret-key"])
    said = [{"role": "user", "content": "my secret question"}]
    headers = {"Authorization": "Bearer secret-key"}
    client.post(CHAT, json=chat_body(messages=said), headers=headers).close()
    client.get("/secret/path?secret=1", headers=headers).close()
    client.post(CHAT, data=b'{"secret', headers=headers).close()
    told = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert told.count("gen_ai.request.id") == 3
    for text in ("secret", "question", "Hello"):
        assert text not in told


def test_errors_have_their_code_and_only_the_servers_own_are_errors_of_the_span(
    make_traced, exporter, engine
):
    client = make_traced()
    client.post(CHAT, json=chat_body(temperature=9)).close()
    engine.fail = StepFailed("no")
    with client.post(CHAT, json=chat_body(stream=True)) as response:
        response.get_data()
    theirs, ours = [span for span in exporter.get_finished_spans() if " " in span.name]
    assert theirs.attributes is not None
    assert theirs.attributes["error.type"] == "invalid_value"
    assert theirs.attributes["http.response.status_code"] == 400
    assert theirs.status.status_code == StatusCode.UNSET
    assert ours.attributes is not None
    assert ours.attributes["error.type"] == "step_failed"
    assert ours.attributes["http.response.status_code"] == 200
    assert (ours.status.status_code, ours.status.description) == (StatusCode.ERROR, "step_failed")


def test_a_stream_that_nobody_reads_to_its_end_ends_its_span(
    make_traced, exporter, engine, monkeypatch
):
    monkeypatch.setattr(generation, "TICK_S", 0.001)
    engine.hang = True
    make_traced().post(CHAT, json=chat_body(stream=True)).close()
    span = spans(exporter)["request"]
    assert span.attributes is not None
    assert span.attributes["error.type"] == "client_closed_request"
    assert span.status.status_code == StatusCode.UNSET


def test_probes_make_no_spans(make_traced, exporter):
    client = make_traced()
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        client.get(path).close()
    assert exporter.get_finished_spans() == ()


def test_a_collector_that_never_answers_holds_nobody_for_longer_than_it_may():
    class Stuck:
        def force_flush(self) -> None:
            threading.Event().wait(30)

        def get_tracer(self, *_: str) -> None:
            return None

    began = time.monotonic()
    Tracing(Stuck()).flush(0.05)  # type: ignore[arg-type]
    assert time.monotonic() - began < 20


def test_tracing_is_off_unless_asked_for():
    assert tracing.start(fake_config()) is None


def test_without_its_packages_the_start_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    config = fake_config(tracing="on")
    origin = Origin("env", "OTEL_EXPORTER_OTLP_ENDPOINT")
    known = Config(None, "test", config.server, config.deployment, {"server.tracing": origin})
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_ENDPOINT") as caught:
        tracing.start(known)
    assert "moorage[otel]" in str(caught.value.hint)
    assert "is not installed" in caught.value.message
