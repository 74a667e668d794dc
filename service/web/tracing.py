"""OpenTelemetry: one span for each request, over its whole answer, made when that is through.

All times are known then, so nothing is carried along while an answer is streamed, and the span ends
where the stream really does. Numbers and names only: no prompt, no answer, no key.
"""

import threading
import time
from typing import TYPE_CHECKING

from service import __version__
from service.config.origin import BUILT_IN
from service.config.schema import Config
from service.errors import ConfigError
from service.errors import Problem
from service.web.access import QUIET_ROUTES
from service.web.access import Record

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""Route -> gen_ai.operation.name."""


class Tracing:
    """An observer of requests that makes their spans. Any thread."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("moorage", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, record: Record) -> None:
        """Make the spans of a request whose answer is through, and note the trace's id in it."""
        if record.route in QUIET_ROUTES:
            return
        from opentelemetry import trace

        # Spans have the time of day; differences are those of the clock that does not jump.
        offset_s = time.time() - time.monotonic()

        def at(seconds: float) -> int:
            return int((seconds + offset_s) * 1e9)

        ended = record.began + record.seconds
        carried = {"traceparent": record.traceparent, "tracestate": record.tracestate}
        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            self._propagator.extract({name: text for name, text in carried.items() if text}),
            kind=trace.SpanKind.SERVER,
            attributes=attributes(record),
            start_time=at(record.began),
        )
        if record.fault:
            span.set_status(trace.Status(trace.StatusCode.ERROR, record.code))
        inside = trace.set_span_in_context(span)
        for name, began, end in _phases(record, ended):
            child = self._tracer.start_span(name, inside, start_time=at(began))
            child.end(at(end))
        span.end(at(ended))
        context = span.get_span_context()
        if context.is_valid:
            record.trace_id = f"{context.trace_id:032x}"

    def flush(self, seconds: float) -> None:
        """Send what has not been sent, and give up after so many seconds.

        In a thread of its own, because the SDK's own limit does not hold for a collector that
        accepts and never answers.
        """
        sender = threading.Thread(target=self._provider.force_flush, name="spans", daemon=True)
        sender.start()
        sender.join(seconds)


def start(config: Config) -> Tracing | None:
    """Tracing as configured, or None if it is off. It starts a thread: never in the master.

    OTEL_* variables say where spans go and how many; the SDK reads them. Raises ConfigError when
    the packages are missing.
    """
    if config.server.tracing == "off":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        origin = config.origins.get("server.tracing", BUILT_IN)
        said = f"server.tracing is on, and {error.name or 'opentelemetry'} is not installed"
        problem = Problem(origin.where(), "server.tracing", said, origin.source, origin.column)
        hint = "pip install 'moorage[otel]', or set server.tracing: off"
        raise ConfigError([problem], hint=hint) from error
    name = {"service.name": "moorage"}  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win
    about = Resource(name).merge(Resource.create({"service.version": __version__}))
    if str(about.attributes.get("service.name", "")).startswith("unknown_service"):
        about = about.merge(Resource(name))
    # no atexit: a worker ends without it, and flushes itself
    provider = TracerProvider(resource=about, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


def attributes(record: Record) -> "dict[str, AttributeValue]":
    """What is said of a request, by OpenTelemetry's conventions for HTTP and for GenAI.

    Waiting and the first token have vLLM's names: the conventions have none for servers.
    """
    found: dict[str, AttributeValue | None] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": record.code,
        "gen_ai.request.id": record.request_id,
        "moorage.key": record.key or None,
    }
    if record.model:
        first = record.first_at
        found |= {
            "gen_ai.provider.name": "moorage",
            "gen_ai.operation.name": OPERATIONS.get(record.route),
            "gen_ai.request.model": record.model,
            "gen_ai.response.model": record.model,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "gen_ai.response.finish_reasons": record.finish_reasons or None,
            "gen_ai.latency.time_in_queue": record.queue_s,
            "gen_ai.latency.time_to_first_token": None if first is None else first - record.began,
            "gen_ai.latency.e2e": record.seconds,
        }
    return {name: value for name, value in found.items() if value is not None}


def _phases(record: Record, ended: float) -> list[tuple[str, float, float]]:
    """Name, begin and end of what the request went through; the last ends where it stopped."""
    submitted, admitted, first = record.submitted_at, record.admitted_at, record.first_at
    if submitted is None or not record.answers:
        return []
    phases = [("queue", submitted, ended)]
    if admitted is not None:
        admitted = max(submitted, admitted)
        phases = [("queue", submitted, admitted), ("prefill", admitted, ended)]
        if first is not None:
            last = max(answer.last_at or first for answer in record.answers)
            phases[-1] = ("prefill", admitted, max(admitted, first))
            phases.append(("decode", first, last))
    return phases
