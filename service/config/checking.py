"""What is wrong with plain values, in plain words.

Types, limits and names are those of the pydantic models in `schema`; the sentences are ours,
because an operator should read what is right and not what a validator is called.
"""

import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import TypeVar

from annotated_types import Ge
from annotated_types import Gt
from annotated_types import Le
from pydantic import BaseModel
from pydantic import BeforeValidator
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from service.config.old_names import QUANTIZE_NAMES
from service.config.schema import DeploymentConfig
from service.config.schema import FallbackStep
from service.config.schema import FileConfig
from service.config.schema import ServerConfig
from service.config.schema import parse_bytes
from service.config.suggesting import did_you_mean
from service.config.suggesting import valid_are
from service.config.yaml_file import Key
from service.config.yaml_file import describe
from service.config.yaml_file import dotted

Model = TypeVar("Model", bound=BaseModel)

SECRET_KEY = re.compile(r"(?i)(.*[_-])?(keys?|apikeys?|tokens?|secrets?|passwords?|passwd)")

FOREIGN_NAMES = {
    "device_map": "strategy",
    "load_in_4bit": "quantize",
    "load_in_8bit": "quantize",
    "torch_dtype": "dtype",
    "max_model_len": "max_context",
    "max_num_seqs": "max_sequences",
    "host": "bind",
    "port": "bind",
}
"""What other servers and libraries call a key of ours."""


@dataclass(frozen=True)
class Mistake:
    """One wrong key or value.

    `message` is a clause about the key ("is 0; give 1 or more", "has no port; ...") or stands by
    itself ("unknown key; ..."). With `secret` the line it is on must not be shown.
    """

    key: Key
    message: str
    secret: bool = False

    def text(self, prefix: Key = ()) -> str:
        """The message, made a sentence with its key where it is a clause."""
        if self.message.startswith(("is ", "has ")):
            return f"{dotted((*prefix, *self.key))} {self.message}"
        return self.message


def check(model: type[Model], values: Mapping[str, Any]) -> tuple[Model | None, list[Mistake]]:
    """The validated model and no mistakes, or None and every mistake in `values`.

    `values` are what YAML can hold. Nothing is converted on the quiet: "8" is no number and "yes"
    no switch, because a config that means something else than it says is worse than an error.
    """
    try:
        # JSON, because there strict means no conversion except to what JSON lacks: paths, tuples.
        return model.model_validate_json(json.dumps(values), strict=True), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, [_mistake(model, detail) for detail in details]


def keys_of(model: type[BaseModel]) -> tuple[str, ...]:
    """The keys a block may have, in the order of the documentation."""
    return tuple(model.model_fields)


def type_at(model: type[BaseModel], key: Key) -> Any:
    """The declared type of the value at `key`, without Annotated and None; None if undeclared."""
    return _place(model, key).kind


def is_mapping(kind: Any) -> bool:
    return typing.get_origin(kind) is Mapping


# --- one error of pydantic -> one mistake


@dataclass(frozen=True)
class _Place:
    """The declared type at a key, and the limits declared with it."""

    kind: Any
    metadata: tuple[Any, ...] = ()

    @property
    def is_size(self) -> bool:
        validators = (m for m in self.metadata if isinstance(m, BeforeValidator))
        return any(validator.func is parse_bytes for validator in validators)


def _mistake(model: type[BaseModel], detail: ErrorDetails) -> Mistake:
    key: Key = tuple(detail["loc"])
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        return _unknown(model, key)
    if key and key[-1] == "[key]":
        return Mistake(key[:-1], _bad_name(key[:-1]))
    if kind == "missing":
        return Mistake(key, _missing(str(key[-1])))
    place = _place(model, key)
    if key == ("deployments",) and not value:
        return Mistake(key, _missing("deployments").replace("missing", "empty"))
    if kind == "literal_error":
        return Mistake(key, _not_a_choice(str(key[-1]), value, typing.get_args(place.kind)))
    if kind == "value_error" and not place.is_size:
        return Mistake(key, str(detail["ctx"]["error"]))
    if kind == "string_too_short":
        return Mistake(key, "is empty; give text")
    right = _limit(kind, detail.get("ctx", {})) or _right(place, value)
    if right is None:
        return Mistake(key, f"is {describe(value)}; {detail['msg']}")
    return Mistake(key, f"is {describe(value)}; give {right}")


def _limit(kind: str, context: Mapping[str, Any]) -> str | None:
    """What is right, when a number is beyond a limit."""
    if kind == "greater_than_equal":
        return f"{context['ge']:,} or more"
    if kind == "greater_than":
        return f"more than {context['gt']:g}"
    if kind == "less_than_equal":
        return f"{context['le']:,} or less"
    return None


def _range(place: _Place) -> str:
    """ ", 1 to 65,536", ", more than 0", or nothing."""
    above = next((m.gt for m in place.metadata if isinstance(m, Gt)), None)
    low = next((m.ge for m in place.metadata if isinstance(m, Ge)), None)
    high = next((m.le for m in place.metadata if isinstance(m, Le)), None)
    if low is not None:
        return f", {low:,} or more" if high is None else f", {low:,} to {high:,}"
    return "" if above is None else f", more than {above:g}"


def _right(place: _Place, value: Any) -> str | None:
    """What a value of this type looks like."""
    if place.is_size:
        return "a size such as 512MiB or 4GiB"
    if place.kind is bool:
        return "true or false"
    if place.kind is int:
        return f"a whole number{_range(place)}"
    if place.kind is float:
        return f"a number{_range(place)}"
    if place.kind is str:
        number = isinstance(value, (int, float))
        return f"text, in quotes: '{describe(value)}'" if number else "text"
    if place.kind is Path:
        return "a path"
    if place.kind is FallbackStep:
        return "the name of a strategy, or {strategy: NAME, quantize: nf4}"
    origin = typing.get_origin(place.kind)
    if origin is tuple:
        return "a list, for example [one, two]"
    if origin is Mapping or (isinstance(place.kind, type) and issubclass(place.kind, BaseModel)):
        return "a mapping, for example {key: value}"
    return None


def _place(model: type[BaseModel], key: Key) -> _Place:
    place = _Place(model)
    for part in key:
        inner = place.kind
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            field = inner.model_fields.get(str(part))
            if field is None:
                return _Place(None)
            place = _plain(field.annotation, tuple(field.metadata))
        elif typing.get_origin(inner) in (Mapping, tuple):
            place = _plain(typing.get_args(inner)[0 if isinstance(part, int) else 1], ())
        else:
            return _Place(None)
    return place


def _plain(kind: Any, metadata: tuple[Any, ...]) -> _Place:
    """Without Annotated and without None."""
    if typing.get_origin(kind) is typing.Annotated:
        inner, *more = typing.get_args(kind)
        return _plain(inner, (*metadata, *more))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = next(a for a in typing.get_args(kind) if a is not type(None))
        return _plain(inner, metadata)
    flat = (x for m in metadata for x in (getattr(m, "metadata", None) or [m]))
    return _Place(kind, tuple(flat))


def _unknown(model: type[BaseModel], key: Key) -> Mistake:
    name = str(key[-1])
    block = _place(model, key[:-1]).kind
    valid = keys_of(block)
    if SECRET_KEY.fullmatch(name):
        home = (
            "env HF_TOKEN"
            if name.lower().startswith("hf")
            else "the file that server.api_keys_file names, or in env MOORAGE_API_KEYS"
        )
        return Mistake(key, f"a secret does not belong here; put it in {home}", secret=True)
    name = FOREIGN_NAMES.get(name, name)
    if name in valid:
        return Mistake(key, f"unknown key; here it is '{name}'")
    homes: dict[type[BaseModel], str] = {
        FileConfig: "at the top of the file",
        ServerConfig: "in server",
        DeploymentConfig: "in a deployment or in defaults",
    }
    home = next(
        (home for other, home in homes.items() if other is not block and name in keys_of(other)), ""
    )
    if home:
        return Mistake(key, f"unknown key; '{name}' belongs {home}")
    return Mistake(key, f"unknown key{did_you_mean(name, valid) or valid_are(name, valid)}")


def _bad_name(key: Key) -> str:
    name = str(key[-1])
    if key[0] == "deployments" and len(key) == 2:
        return "is no usable name; use letters, digits, '.', '_' and '-'"
    if "key_limits" in key:
        return "is no name of a key; use up to 64 letters, digits, '.', '_' and '-'"
    valid = "cuda:0, cuda:1, ..., cpu or disk"
    if "keep_free" in key:
        valid = f"cuda, {valid}"
    meant = f"; did you mean 'cuda:{name}'?" if name.isdecimal() else ""
    return f"is no device; give {valid}{meant}"


def _missing(name: str) -> str:
    if name == "version":
        return "is missing; write version: 1"
    if name == "deployments":
        return "is missing; name at least one, for example deployments: {laptop: {strategy: cpu}}"
    return "is missing"


def _not_a_choice(name: str, value: Any, choices: tuple[Any, ...]) -> str:
    if name == "version":
        return f"is {describe(value)}; this program reads version 1"
    meant = QUANTIZE_NAMES.get(str(value).lower()) if name == "quantize" else None
    return f"is {describe(value)}{valid_are(meant or str(value), choices)}"
