"""GET /metrics, in every state."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from service.engine.stats import EngineStats
from service.errors import PlacementDrifted
from service.web import latency
from service.web import metrics_reference
from service.web.access import NOT_ACCEPTED
from service.web.access import Answer
from service.web.access import Record
from service.web.app import create_app
from tests.support.fake_deployment import MODEL_ID
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_deployment import fake_config
from tests.support.fake_engine import FakeEngine
from tests.web.asking import COMPLETIONS
from tests.web.asking import completion_body

PAGE = Path(__file__).resolve().parents[2] / "docs/metrics.md"
DOCUMENT = {
    "state": "ready",
    "progress": 1.0,
    "kv": {"planned_tokens": 400},
    "devices": [
        {
            "id": "cuda:0",
            "planned": {"weights": 100, "kv": 20, "overhead": 3},
            "measured": {"allocated": 130, "reserved": 140},
            "plan_error_bytes": -2,
        },
        {"id": "disk", "planned": {"weights": 7, "kv": 0, "overhead": 0}, "measured": None},
    ],
    "certificate": {"valid": True},
    "watch": {"checks": 9, "findings": []},
}


STATS = EngineStats(
    running=3,
    waiting=1,
    steps=50,
    tokens=70,
    kv_tokens=100,
    failed=2,
    prompt_tokens=30,
    prefix_tokens=12,
    preemptions=4,
)


@dataclass
class Counting(FakeEngine):
    def stats(self) -> EngineStats:
        return STATS


class Documented(FakeDeployment):
    def document(self) -> dict[str, Any]:
        return {**DOCUMENT, "state": self.state}


def scraped(deployment: FakeDeployment) -> dict[str, float]:
    """Sample -> value, labels' values behind the name."""
    return read(create_app(deployment).test_client())


def read(client: FlaskClient) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.content_type.startswith("text/plain; version=0.0.4")
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_a_ready_deployment_tells_everything():
    found = scraped(Documented(model=FakeServing(engine=Counting())))
    assert {name: value for name, value in found.items() if "state" not in name} == {
        "moorage:load_progress": 1.0,
        "moorage:planned_bytes cuda:0 weights": 100,
        "moorage:planned_bytes cuda:0 kv": 20,
        "moorage:planned_bytes cuda:0 overhead": 3,
        "moorage:planned_bytes disk weights": 7,
        "moorage:planned_bytes disk kv": 0,
        "moorage:planned_bytes disk overhead": 0,
        "moorage:measured_bytes cuda:0 allocated": 130,
        "moorage:measured_bytes cuda:0 reserved": 140,
        "moorage:plan_error_bytes cuda:0": -2,
        "moorage:certificate_valid": 1,
        "moorage:watch_checks_total": 9,
        "moorage:watch_findings": 0,
        "moorage:kv_tokens_planned": 400,
        "moorage:kv_tokens_used": 100,
        "moorage:engine_steps_total": 50,
        "moorage:request_failure_total": 2,
        f"moorage:num_requests_running 0 {MODEL_ID}": 3,
        f"moorage:num_requests_waiting 0 {MODEL_ID}": 1,
        f"moorage:generation_tokens_total 0 {MODEL_ID}": 70,
        f"moorage:prompt_tokens_total 0 {MODEL_ID}": 30,
        f"moorage:num_preemptions_total 0 {MODEL_ID}": 4,
        f"moorage:prefix_cache_hits_total 0 {MODEL_ID}": 12,
        f"moorage:prefix_cache_queries_total 0 {MODEL_ID}": 42,
        f"moorage:kv_cache_usage_perc 0 {MODEL_ID}": 0.25,
    }
    assert [name for name in found if "state" in name and found[name]] == ["moorage:state ready"]


@pytest.mark.parametrize("state", ["planned", "loading", "validating", "draining", "failed"])
def test_it_answers_before_and_after_it_is_ready(state: str):
    """The engine is not asked, and what is not known yet has no sample."""
    found = scraped(FakeDeployment(state=state, progress=0.25))
    assert found[f"moorage:state {state}"] == 1
    assert found["moorage:load_progress"] == 0.25
    assert found["moorage:certificate_valid"] == 0
    assert not any("requests" in name or "bytes" in name for name in found)


def test_a_changed_model_is_no_error_of_the_scrape():
    drift = PlacementDrifted("lm_head.weight was cast", failure_class="F18")
    found = scraped(FakeDeployment(state="degraded", drift=drift))
    assert found["moorage:state degraded"] == 1


def test_what_vllm_has_too_can_have_its_prefix():
    config = fake_config(metrics_prefix="vllm")
    found = scraped(Documented(config=config, model=FakeServing(engine=Counting())))
    assert found[f"vllm:num_requests_running 0 {MODEL_ID}"] == 3
    assert found[f"vllm:kv_cache_usage_perc 0 {MODEL_ID}"] == 0.25
    assert found["moorage:certificate_valid"] == 1
    assert not any(name.startswith("vllm:state") for name in found)


def test_every_answer_of_a_request_is_in_the_histograms(client: FlaskClient):
    client.post(COMPLETIONS, json=completion_body(prompt=["a", "bb"], max_tokens=4)).close()
    found = read(client)
    ends = f"0 {MODEL_ID}"
    assert found[f"moorage:request_success_total 0 length {MODEL_ID}"] == 2
    assert found[f"moorage:request_prompt_tokens_sum {ends}"] == 3
    assert found[f"moorage:request_generation_tokens_sum {ends}"] == 8
    assert found[f"moorage:inter_token_latency_seconds_count {ends}"] == 6
    for name in (
        "time_to_first_token",
        "e2e_request_latency",
        "request_queue_time",
        "request_prefill_time",
        "request_decode_time",
        "request_inference_time",
        "request_time_per_output_token",
    ):
        assert found[f"moorage:{name}_seconds_count {ends}"] == 2, name


class Waiting:
    """A sequence as the engine left it."""

    def __init__(self, admitted_at: float | None) -> None:
        self.admitted_at = admitted_at
        self.prompt_tokens = 7


@dataclass
class Part:
    completion_tokens: int
    finish_reason: str | None = None


def test_times_of_a_sequence_are_what_was_seen():
    app = create_app(FakeDeployment())
    answer = Answer(Waiting(11.0))
    for now, tokens in ((13.0, 1), (13.0, 1), (14.0, 3), (16.0, 3)):
        answer.saw(Part(tokens), now)
    answer.saw(Part(3, "stop"), 16.0)
    assert list(answer.gaps_s) == [0.5, 0.5]
    record = Record("r", 10.0, "POST", "/v1/completions", model="m", submitted_at=10.5)
    record.answers = (answer, Answer(Waiting(None)))
    record.code = NOT_ACCEPTED
    assert (record.queue_s, record.first_at) == (0.5, 13.0)
    observe = next(o for o in _observers(app) if isinstance(o, latency.Latencies))
    observe(record)
    found = read(app.test_client())
    told = {
        name: found[f"moorage:{name}_sum 0 m"]
        for name, *_ in latency.HISTOGRAMS
        if f"moorage:{name}_sum 0 m" in found
    }
    assert told == {
        "time_to_first_token_seconds": 3.0,
        "inter_token_latency_seconds": 1.0,
        "request_time_per_output_token_seconds": 0.5,
        "e2e_request_latency_seconds": 4.0,
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 2.0,
        "request_decode_time_seconds": 1.0,
        "request_inference_time_seconds": 3.0,
        "request_prompt_tokens": 14.0,
        "request_generation_tokens": 3.0,
    }
    assert found["moorage:request_success_total 0 stop m"] == 1
    assert found["moorage:request_success_total 0 abort m"] == 1


def _observers(app: Any) -> Any:
    with app.test_request_context("/health/live"):
        app.preprocess_request()
        from flask import g

        return g.record.observers


def test_the_page_of_metrics_has_every_one_and_no_other():
    app = create_app(Documented(model=FakeServing(engine=Counting())))
    client = app.test_client()
    client.post(COMPLETIONS, json=completion_body(max_tokens=4)).close()
    families = text_string_to_metric_families(client.get("/metrics").text)
    told = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in families
        if not family.name.endswith("_created")
    }
    page = PAGE.read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(moorage:\w+)`", page, re.MULTILINE)) == sorted(told)


def test_the_page_of_metrics_is_made_from_the_code():
    said = "run: python -m service.web.metrics_reference > docs/metrics.md"
    assert PAGE.read_text(encoding="utf-8") == metrics_reference.markdown(), said


def test_two_applications_do_not_share_a_registry():
    for deployment in (FakeDeployment(), FakeDeployment(state="loading")):
        assert scraped(deployment)[f"moorage:state {deployment.state}"] == 1


def test_metrics_need_a_key_where_there_are_keys(make_client):
    client = make_client(api_keys=["k"])
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": "Bearer k"}).status_code == 200
