"""One value written as text, in an environment variable or after --set, becomes a setting."""

import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from service.config import checking
from service.config.layers import SERVER
from service.config.layers import Setting
from service.config.origin import Origin
from service.config.schema import DeploymentConfig
from service.config.schema import ServerConfig
from service.config.suggesting import did_you_mean
from service.config.yaml_file import UNUSABLE
from service.config.yaml_file import dotted
from service.config.yaml_file import parse_value
from service.errors import Problem


def deployment_keys() -> tuple[str, ...]:
    return checking.keys_of(DeploymentConfig)


def server_keys() -> tuple[str, ...]:
    """With the prefix that settings of the server block have."""
    return tuple(f"{SERVER}{key}" for key in checking.keys_of(ServerConfig))


def setting(key: str, text: str, origin: Origin) -> tuple[list[Setting], list[Problem]]:
    """The setting that `key` and `text` say, checked, or what is wrong with them.

    A dotted key ("options.device", "keep_free.cuda") sets one entry of a mapping. Text, names and
    paths are taken as they stand (quotes around them are removed); everything else is read as YAML.
    """
    field, dot, entry = _split(key)
    if field not in (*deployment_keys(), *server_keys()):
        return [], [Problem(origin.where(), key, _unknown(key))]
    model: type[BaseModel] = ServerConfig if field.startswith(SERVER) else DeploymentConfig
    name = field.removeprefix(SERVER)
    kind = checking.type_at(model, (name,))
    if dot and (not entry or not checking.is_mapping(kind)):
        message = "has an empty entry" if checking.is_mapping(kind) else "is one value, no mapping"
        return [], [Problem(origin.where(), field, f"{field} {message}; set {field} itself")]
    try:
        value = _value(checking.type_at(model, (name, entry)) if dot else kind, text)
    except ValueError as error:
        return [], [Problem(origin.where(), key, str(error))]
    _, mistakes = checking.check(model, {name: {entry: value} if dot else value})
    prefix = ("server",) if field.startswith(SERVER) else ()
    problems = [
        Problem(origin.where(), dotted((*prefix, *m.key)), m.text(prefix)) for m in mistakes
    ]
    if problems:
        return [], problems
    return [Setting(field, value, origin, entry if dot else None)], []


def _split(key: str) -> tuple[str, str, str]:
    head = SERVER if key.startswith(SERVER) else ""
    field, dot, entry = key.removeprefix(head).partition(".")
    return head + field, dot, entry


def _value(kind: Any, text: str) -> Any:
    if UNUSABLE.search(text):
        raise ValueError("contains a zero byte or is not UTF-8 text")
    if kind is Path and text in ("", "null"):
        return None
    if kind in (str, Path) or typing.get_origin(kind) is typing.Literal:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    return parse_value(text)


def _unknown(key: str) -> str:
    valid = (*deployment_keys(), *server_keys())
    if key == "deployment":
        return "unknown key; choose with --deployment"
    if f"{SERVER}{key}" in valid:
        return f"unknown key; did you mean '{SERVER}{key}'?"
    for prefix in ("defaults.", "deployments."):
        if key.startswith(prefix):
            return f"unknown key; write '{key.rpartition('.')[2]}', it is set for what runs"
    return f"unknown key{did_you_mean(key, valid)}"
