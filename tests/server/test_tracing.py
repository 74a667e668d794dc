"""Spans of a real gunicorn worker, sent to a real collector of a few lines."""

import contextlib
import http.server
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.server.process import ROOT
from tests.server.process import Server
from tests.server.test_web import answer
from tests.server.test_web import chat
from tests.server.test_web import line_of
from tests.server.test_web import post
from tests.server.test_web import ready
from tests.server.test_web import serving

TRACE = "0af7651916cd43dd8448eb211c80319c"
NEVER_BY_ITSELF = {"OTEL_BSP_SCHEDULE_DELAY": "3600000"}


class Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP over HTTP. stuck: accepts and never answers."""

    daemon_threads = True

    def __init__(self, *, stuck: bool) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.stuck = stuck
        self.asked = threading.Event()
        self.released = threading.Event()
        self.received: list[ExportTraceServiceRequest] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def spans(self) -> list[Any]:
        return [
            span
            for request in self.received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class Receiver(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        self.server.asked.set()
        if self.server.stuck:
            self.server.released.wait()
            return
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the test's terminal."""


@contextlib.contextmanager
def collecting(*, stuck: bool = False) -> Iterator[Collector]:
    with Collector(stuck=stuck) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            collector.released.set()
            collector.shutdown()
            thread.join()


def ask(server: Server, request_id: str) -> None:
    more = (f"X-Request-Id: {request_id}", f"traceparent: 00-{TRACE}-b7ad6b7169203331-01")
    connection = server.send(post("/v1/chat/completions", chat(stream=True), *more))
    with answer(connection) as response:
        assert response.status == 200
        assert response.read().endswith(b"data: [DONE]\n\n")
    assert line_of(server, request_id)["trace_id"] == TRACE


def test_spans_are_sent_when_the_server_stops_and_the_master_has_no_thread(tmp_path: Path) -> None:
    with collecting() as collector:
        where = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, **NEVER_BY_ITSELF}
        patient = {"TEST_FAREWELL_S": "60", "TEST_FLUSH_S": "60"}
        with serving(tmp_path, OTEL_SERVICE_NAME="mine", **where, **patient) as server:
            ask(ready(server), "r1")
            assert psutil.Process(server.process.pid).num_threads() == 1
            assert not collector.asked.is_set()
            server.signal(signal.SIGTERM)
            assert server.exit_status() == 0
        found = {span.name: span for span in collector.spans()}
    assert sorted(found) == ["POST /v1/chat/completions", "decode", "prefill", "queue"]
    request = found["POST /v1/chat/completions"]
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    assert {found[name].parent_span_id for name in ("decode", "prefill", "queue")} == {
        request.span_id
    }
    told = {pair.key for pair in request.attributes}
    assert {"gen_ai.request.model", "gen_ai.usage.output_tokens"} <= told
    (about,) = [r.resource for request in collector.received for r in request.resource_spans]
    names = {pair.key: pair.value.string_value for pair in about.attributes}
    assert names["service.name"] == "mine"


def test_a_collector_that_never_answers_does_not_keep_the_server(tmp_path: Path) -> None:
    with collecting(stuck=True) as collector:
        where = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, **NEVER_BY_ITSELF}
        with serving(tmp_path, **where) as server:
            ask(ready(server), "r1")
            server.signal(signal.SIGTERM)
            assert server.exit_status() == 0
        assert collector.asked.is_set()


def test_the_file_may_say_off_whatever_the_environment_says(tmp_path: Path) -> None:
    (tmp_path / "moorage.yaml").write_text(
        'version: 1\nserver: {tracing: "off"}\ndeployments: {a: {}}\n'
    )
    with collecting() as collector:
        with serving(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as server:
            ask(ready(server), "r1")
            server.signal(signal.SIGTERM)
            assert server.exit_status() == 0
        assert not collector.asked.is_set()


def test_without_the_packages_the_server_ends_with_the_name_of_the_extra(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden" / "opentelemetry"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").touch()
    path = f"{tmp_path / 'hidden'}:{ROOT}"
    with serving(tmp_path, MOORAGE_TRACING="on", PYTHONPATH=path) as server:
        assert server.exit_status() == 3
        assert "pip install 'moorage[otel]'" in server.log()
