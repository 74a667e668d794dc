"""docs/api.md says what the code does. On a difference, paste what the failing test shows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from service import errors
from service.web import body
from service.web import fields
from service.web import schemas
from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def table() -> str:
    """The table of all request fields, as the page must have it."""
    chat = column(schemas.CHAT_DONE, fields.CHAT_NOT_DONE)
    completions = column(schemas.COMPLETION_DONE, fields.COMPLETION_NOT_DONE)
    rows = ["| field | chat | completions |", "| --- | --- | --- |"]
    for name in sorted({*chat, *completions}):
        rows.append(f"| `{name}` | {chat.get(name, '-')} | {completions.get(name, '-')} |")
    return "\n".join(rows)


def column(done: frozenset[str], not_done: Mapping[str, tuple[Any, ...]]) -> dict[str, str]:
    said = dict.fromkeys(done, "done") | dict.fromkeys(fields.HARMLESS, "no effect")
    for name, values in not_done.items():
        nothing = " or ".join(f"`{json.dumps(value)}`" for value in values)
        said[name] = f"only {nothing}" if nothing else "refused"
    return said


def test_the_table_of_fields_is_what_the_code_does():
    assert table() in PAGE


@pytest.mark.parametrize(
    "sentence",
    [
        f"up to {schemas.MAX_STOPS} strings of up to {schemas.MAX_STOP_CHARACTERS} characters",
        f"up to {schemas.MAX_STOP_TOKENS} ids",
        f"a completion has {schemas.COMPLETION_TOKENS} tokens",
        f"{schemas.MAX_MESSAGES} messages",
        f"{schemas.MAX_PARTS} content parts",
        f"{schemas.MAX_PROMPTS} prompts",
        f"integers of more than {body.MAX_DIGITS} characters",
        f"nesting deeper than {body.MAX_DEPTH} levels",
    ],
)
def test_every_limit_is_told(sentence):
    assert sentence in PAGE


def test_every_endpoint_is_told():
    for rule in create_app(FakeDeployment()).url_map.iter_rules():
        path = rule.rule.replace("<path:model_id>", "{id}")
        method = next(iter(rule.methods - {"HEAD", "OPTIONS"}))
        assert f"`{method} {path}`" in PAGE


def test_every_error_of_a_request_is_told():
    waiting = [errors.RequestError]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind is not errors.RequestError:
            assert f"| {kind.status} | `{kind.code}` |" in PAGE, kind
