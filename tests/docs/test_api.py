"""docs/api.md says what the code does. On a difference, paste what the failing test shows."""

import re
from pathlib import Path

import pytest

from service import errors
from service.text import constraints
from service.text.tools import MAX_CALLS
from service.web import body
from service.web import formats
from service.web import generation
from service.web import reference
from service.web import responses_schema
from service.web import schemas
from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_table_of_fields_is_what_the_code_does():
    assert reference.table() in PAGE


@pytest.mark.parametrize(
    "sentence",
    [
        f"up to {schemas.MAX_STOPS} strings of up to {schemas.MAX_STOP_CHARACTERS} characters",
        f"up to {schemas.MAX_STOP_TOKENS} ids",
        f"a completion has {schemas.COMPLETION_TOKENS} tokens",
        f"{schemas.MAX_MESSAGES} messages",
        f"{schemas.MAX_PARTS} content parts",
        f"{schemas.MAX_PROMPTS} prompts",
        f"up to {schemas.MAX_BIASES} token ids",
        f"up to {schemas.MAX_LOGPROBS} likeliest tokens",
        f"{generation.MAX_TOLD:,} logprobs at most",
        f"may have {constraints.MAX_GRAMMAR_CHARACTERS} characters and"
        f" {constraints.MAX_SCHEMA_DEPTH} levels",
        f"may not be above {constraints.MAX_MULTIPLE}",
        f"functions, up to {formats.MAX_TOOLS}",
        f"Up to {MAX_CALLS} calls",
        f"integers of more than {body.MAX_DIGITS} characters",
        f"nesting deeper than {body.MAX_DEPTH} levels",
        f"is text, or up to {schemas.MAX_MESSAGES} items",
        f"up to {responses_schema.MAX_METADATA} names of up to 64 characters",
        f"up to {responses_schema.METADATA_CHARACTERS}, and comes back",
    ],
)
def test_every_limit_is_told(sentence):
    assert sentence in PAGE


def test_every_endpoint_is_told():
    for rule in create_app(FakeDeployment()).url_map.iter_rules():
        path = re.sub("<.*?>", "{id}", rule.rule)
        method = next(iter(rule.methods - {"HEAD", "OPTIONS"}))
        assert f"`{method} {path}`" in PAGE


def test_every_error_of_a_request_is_told():
    waiting = [errors.RequestError]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind is not errors.RequestError:
            assert f"| {kind.status} | `{kind.code}` |" in PAGE, kind
