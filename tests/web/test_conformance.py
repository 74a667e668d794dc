"""Schemathesis asks the real app everything that its OpenAPI document allows, and more."""

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck
from hypothesis import settings
from schemathesis.config import SchemathesisConfig
from schemathesis.generation.meta import TestPhase
from schemathesis.specs.openapi.checks import positive_data_acceptance

from service.engine.engine import Engine
from service.engine.runner import Runner
from service.web import security
from service.web.app import create_app
from tests.support.fake_deployment import MODEL_ID
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_deployment import fake_config
from tests.support.templates import tool_tokenizer
from tests.support.tiny import tiny_model

CONTEXT = 400
KEY = "a-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
# what keeps answers short, where a request has it
LIMIT = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
# Bodies with many fields have a thousand systematic cases each; one of so many is tried. The order
# is always the same, so the ones that are tried are, too.
EACH = {"/v1/chat/completions": 6, "/v1/completions": 6, "/v1/responses": 6, "/tokenize": 4}
TURN: dict[str, Iterator[int]] = defaultdict(count)
# Why a body that the document allows may be refused all the same: rules between fields, and what
# depends on the model. JSON Schema could say the former only in a way that nobody would read.
BEYOND = (
    r"maximum context length is|prompt is empty|the body has an integer of|gives no embeddings"
    r"|give either prompt or messages|tools go with messages|must be one of this model's ids"
    r"|is not one of this model's ids"
    r"|stream_options is for streams|max_completion_tokens differ|top_logprobs is for answers with"
    r"|best_of is \d+, and n|max_tokens is 0; give 1|min_tokens is \d+; give from"
    r"|two tools are called|not among the tools|there are no tools|this server takes \d+ at once"
    r"|not the text of a JSON object|no function_call before it has this id"
    r"|add_special_tokens must be false with messages"
    r"|must be an integer, not a number"  # 15.0, an integer to JSON Schema
)


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    """The app around a tiny model, whose template has tools."""

    def place_inputs(model: object, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(inputs)

    runner = Runner(tiny_model(), place_inputs, max_context=CONTEXT, max_sequences=4)
    engine = Engine(runner, max_queue=8)
    engine.start()
    yield app_around(FakeServing(engine, tool_tokenizer("hermes"), max_context=CONTEXT))
    engine.close()


def app_around(serving: FakeServing) -> Any:
    config = fake_config(api_keys=[KEY], max_sequences=4, max_queue=8)
    return create_app(FakeDeployment(config, model=serving))


def asked() -> Any:
    """What there is to ask. Its app is another one: a model is made when a test needs it."""
    config = SchemathesisConfig.from_dict(
        {"seed": 1, "headers": HEADERS, "generation": {"deterministic": True, "database": "none"}}
    )
    app = app_around(FakeServing())
    return schemathesis.openapi.from_wsgi("/openapi.json", app, config=config, headers=HEADERS)


def refused_beyond(response: Any, rules: str) -> bool:
    """Whether it is a refusal by one of these rules, a regular expression of messages."""
    return response.status_code == 400 and bool(
        re.search(rules, response.json()["error"]["message"])
    )


def accepted(ctx: Any, response: Any, case: Any) -> bool | None:
    """positive_data_acceptance, but for the rules that no schema says."""
    if refused_beyond(response, BEYOND):
        return None
    return positive_data_acceptance(ctx, response, case)


# For / its client asks /./, because the document's server is "./"; test_page.py asks for /.
schema = asked().exclude(path="/")


@schema.parametrize()
@settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_everything_that_is_asked_is_answered_as_the_document_says(case: Any, app: Any) -> None:
    if case.meta.phase.name is TestPhase.COVERAGE and next(TURN[case.path]) % EACH.get(
        case.path, 1
    ):
        return
    body = case.body
    if isinstance(body, dict) and "model" in body and case.meta.generation.mode.is_positive:
        body["model"] = MODEL_ID
        if case.path in LIMIT:
            body.setdefault(LIMIT[case.path], 1)
    if security.TIMEOUT.fullmatch((case.headers or {}).get(security.TIMEOUT_HEADER) or ""):
        case.headers[security.TIMEOUT_HEADER] = "200"  # or a slow machine would answer 504
    case.operation.schema.app = app
    case.operation.app = app
    case.call_and_validate(additional_checks=[accepted], excluded_checks=[positive_data_acceptance])
