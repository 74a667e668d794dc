"""Schemathesis asks a model that gives embeddings: test_conformance has one that generates."""

import base64
from collections import Counter
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings
from schemathesis.generation.meta import TestPhase
from schemathesis.specs.openapi.checks import positive_data_acceptance

from service.deployment.serving import Embeddings
from service.engine.embedding import EmbeddingRunner
from service.engine.engine import Engine
from service.models.sentence_files import SentenceFiles
from service.web import security
from tests.support.encoders import tiny_encoder
from tests.support.fake_deployment import MODEL_ID
from tests.support.fake_deployment import FakeServing
from tests.support.tiny import HIDDEN
from tests.support.tiny import tiny_tokenizer
from tests.web.test_conformance import HEADERS
from tests.web.test_conformance import app_around
from tests.web.test_conformance import asked
from tests.web.test_conformance import refused_beyond

CONTEXT = 128
PATH = "/v1/embeddings"
# what depends on the model
BEYOND = (
    r"maximum context length is|the body has an integer of|has no tokens"
    r"|dimensions is \d+; |this model's ids are 0 to|must be an integer, not a number"
)
# of the systematic cases, of which there are a thousand, one of so many is tried, always the same
EACH = 5
TURN = count()
answered: Counter[tuple[int, str]] = Counter()


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    def place_inputs(model: object, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(inputs)

    runner = EmbeddingRunner(
        tiny_encoder(), place_inputs, SentenceFiles(), max_context=CONTEXT, max_sequences=4
    )
    engine = Engine(runner, max_queue=8)
    engine.start()
    gives = Embeddings(dimension=HIDDEN, at_once=4)
    yield app_around(FakeServing(engine, tiny_tokenizer(), max_context=CONTEXT, embeddings=gives))
    engine.close()


def accepted(ctx: Any, response: Any, case: Any) -> bool | None:
    """positive_data_acceptance, but for the rules that no schema says."""
    if refused_beyond(response, BEYOND):
        return None
    return positive_data_acceptance(ctx, response, case)


schema = asked().include(path=PATH)


@schema.parametrize()
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_whatever_is_embedded_is_answered_as_the_document_says(case: Any, app: Any) -> None:
    if case.meta.phase.name is TestPhase.COVERAGE and next(TURN) % EACH:
        return
    body = case.body
    positive = case.meta.generation.mode.is_positive
    if isinstance(body, dict) and "model" in body and positive:
        body["model"] = MODEL_ID
        if case.meta.phase.name is not TestPhase.COVERAGE:
            body.pop("dimensions", None)
    if security.TIMEOUT.fullmatch((case.headers or {}).get(security.TIMEOUT_HEADER) or ""):
        case.headers[security.TIMEOUT_HEADER] = "200"  # or a slow machine would answer 504
    case.operation.schema.app = app
    case.operation.app = app
    response = case.call_and_validate(
        additional_checks=[accepted], excluded_checks=[positive_data_acceptance]
    )
    kind = body.get("encoding_format") or "float" if isinstance(body, dict) else "none"
    answered[response.status_code, kind if isinstance(kind, str) else "other"] += 1


def test_of_those_some_were_embedded_in_both_forms_and_some_refused() -> None:
    if not answered:
        pytest.skip("runs after the others of this file")
    assert min(answered[200, "float"], answered[200, "base64"]) > 0, answered
    assert sum(count for (status, _), count in answered.items() if status == 400) > 0, answered
    assert {status for status, _ in answered} <= {200, 400, 401, 404, 405, 406, 415}, answered


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("given", ["a", ["a", "bc"], [97, 98], [[97], [98, 99]]])
def test_every_form_of_input_is_answered_with_rows_of_the_models_size(
    app: Any, given: Any, encoding: str
) -> None:
    body = {"model": MODEL_ID, "input": given, "encoding_format": encoding}
    response = app.test_client().post(PATH, json=body, headers=HEADERS)
    assert response.status_code == 200, response.get_data(as_text=True)
    for item in response.get_json()["data"]:
        row = item["embedding"]
        size = len(base64.b64decode(row)) // 4 if encoding == "base64" else len(row)
        assert size == HIDDEN
