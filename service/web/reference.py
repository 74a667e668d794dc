"""The table of all request fields, made from the code.

`python -m service.web.reference` prints what stands between the two marks in docs/api.md.
"""

import json
import sys
from collections.abc import Collection
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from service.web import embeddings_schema
from service.web import fields
from service.web import responses_schema
from service.web import schemas

START = "<!-- Made by `python -m service.web.reference`; a test compares. -->"
END = "<!-- The end of what is made. -->"
# a bound above this is only there to keep a number inside 32 or 64 bits
SHOWN = 10**6
SIGNS = {"ge": "at least", "gt": "above", "le": "at most"}


def table() -> str:
    """Every field of a request that is known, and what is done with it."""
    columns = [
        _column(schemas.ChatRequest, schemas.CHAT_DONE, fields.HARMLESS, fields.CHAT_NOT_DONE),
        _column(
            schemas.CompletionRequest,
            schemas.COMPLETION_DONE,
            fields.HARMLESS,
            fields.COMPLETION_NOT_DONE,
        ),
        _column(
            responses_schema.ResponseRequest,
            responses_schema.RESPONSE.done,
            fields.RESPONSE_HARMLESS,
            fields.RESPONSE_NOT_DONE,
        ),
        _column(
            embeddings_schema.EmbeddingRequest,
            embeddings_schema.EMBEDDING.done,
            fields.HARMLESS,
            fields.EMBEDDING_NOT_DONE,
        ),
    ]
    heads = ("field", "chat", "completions", "responses", "embeddings")
    rows = [START, "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name in sorted(set().union(*columns)):
        said = " | ".join(column.get(name, "-") for column in columns)
        rows.append(f"| `{name}` | {said} |")
    return "\n".join([*rows, "", END])


def _column(
    model: type[BaseModel],
    done: Collection[str],
    harmless: Collection[str],
    not_done: Mapping[str, tuple[Any, ...]],
) -> dict[str, str]:
    said = {name: f"done{_bounds(model, name)}" for name in done}
    said |= dict.fromkeys(harmless, "no effect")
    for name in fields.OF_HARMLESS.keys() & said.keys():
        within = fields.OF_HARMLESS[name].items()
        said[name] += "".join(f"; its `{inner}`: {_only(values)}" for inner, values in within)
    said |= {name: _only(values) for name, values in not_done.items()}
    if "best_of" in said:
        said["best_of"] = "only the same as `n`"
    return said


def _only(values: tuple[Any, ...]) -> str:
    nothing = " or ".join(f"`{json.dumps(value)}`" for value in values)
    return f"only {nothing}" if nothing else "refused"


def _bounds(model: type[BaseModel], name: str) -> str:
    """A number's limits, as ": at least 0, at most 2"."""
    found = model.model_fields.get(name)
    limits = []
    for constraint in found.metadata if found else ():
        for key, words in SIGNS.items():
            value = getattr(constraint, key, None)
            if value is not None and abs(value) <= SHOWN:
                limits.append(f"{words} {value:g}")
    return ": " + ", ".join(limits) if limits else ""


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
