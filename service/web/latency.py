"""What requests took, as histograms: observed when a request ends, one value for each sequence.

Names, labels and buckets are those of vLLM, so that dashboards made for it read them.
"""

from prometheus_client import CollectorRegistry
from prometheus_client import Counter
from prometheus_client import Histogram

from service.web.access import NOT_ACCEPTED
from service.web.access import Answer
from service.web.access import Record
from service.web.access import queued_s

LABELS = ("model_name", "engine")
ENGINE = "0"  # one process, one engine
REASONS = ("stop", "length", "abort", "error")

LONG = (7.5, 10.0, 20.0, 40.0, 80.0)
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(*LONG, 160.0, 640.0, 2560.0),
)
BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, *LONG)
WHOLE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(n * 10**power) for power in range(6) for n in (1, 2, 5))

# name, what it is, buckets
HISTOGRAMS = (
    ("time_to_first_token_seconds", "From the request's head to the first token.", FIRST_TOKEN),
    ("inter_token_latency_seconds", "From one token to the next, each.", BETWEEN),
    (
        "request_time_per_output_token_seconds",
        "From one token to the next, the mean of a sequence.",
        BETWEEN,
    ),
    ("e2e_request_latency_seconds", "From the request's head to its last token.", WHOLE),
    ("request_queue_time_seconds", "In the queue, until the sequence left it.", WHOLE),
    ("request_prefill_time_seconds", "From leaving the queue to the first token.", WHOLE),
    ("request_decode_time_seconds", "From the first token to the last.", WHOLE),
    ("request_inference_time_seconds", "From leaving the queue to the last token.", WHOLE),
    ("request_prompt_tokens", "Tokens of the prompt.", TOKENS),
    ("request_generation_tokens", "Tokens of the answer.", TOKENS),
)
# name, what it is, labels
ENDED = (
    "request_success",
    "Sequences that ended, by how: stop, length, error, or abort if the client left.",
    (*LABELS, "finished_reason"),
)


class Latencies:
    """An observer of requests that keeps histograms. Any thread."""

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        """prefix: of every name, without the colon."""
        self._histograms = {
            name: Histogram(f"{prefix}:{name}", text, LABELS, registry=registry, buckets=buckets)
            for name, text, buckets in HISTOGRAMS
        }
        name, text, labels = ENDED
        self._ended = Counter(f"{prefix}:{name}", text, labels, registry=registry)

    def __call__(self, record: Record) -> None:
        for answer in record.answers:
            self._answer(record, answer)

    def _answer(self, record: Record, answer: Answer) -> None:
        model, admitted = record.model, answer.stream.admitted_at
        first, last = answer.first_at, answer.last_at
        self._ended.labels(model, ENGINE, _reason(record, answer)).inc()
        self._see(model, "request_prompt_tokens", answer.stream.prompt_tokens)
        self._see(model, "request_generation_tokens", answer.tokens)
        self._see(model, "request_queue_time_seconds", queued_s(record.submitted_at, admitted))
        if first is None or last is None:
            return
        self._see(model, "time_to_first_token_seconds", first - record.began)
        self._see(model, "e2e_request_latency_seconds", last - record.began)
        self._see(model, "request_decode_time_seconds", last - first)
        if admitted is not None:
            self._see(model, "request_prefill_time_seconds", max(0.0, first - admitted))
            self._see(model, "request_inference_time_seconds", max(0.0, last - admitted))
        if answer.tokens > 1:
            mean = (last - first) / (answer.tokens - 1)
            self._see(model, "request_time_per_output_token_seconds", mean)
        gaps = self._histograms["inter_token_latency_seconds"].labels(model, ENGINE)
        for gap in answer.gaps_s:
            gaps.observe(gap)

    def _see(self, model: str, name: str, value: float | None) -> None:
        if value is not None:
            self._histograms[name].labels(model, ENGINE).observe(value)


def _reason(record: Record, answer: Answer) -> str:
    """How a sequence ended, in vLLM's words."""
    if answer.finish_reason is not None:
        return answer.finish_reason if answer.finish_reason in REASONS else "stop"
    return "abort" if record.code == NOT_ACCEPTED else "error"
