"""What a request says about the form of its answer: response_format, tools and tool_choice."""

import json
import re
from collections.abc import Mapping
from typing import Any

from service.errors import InvalidRequest
from service.errors import UnsupportedParameter
from service.web import fields
from service.web.body import kind
from service.web.body import short

MAX_TOOLS = 128
MAX_CALLS = 128  # in one message
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CHOICES = ("auto", "none", "required")
_FORMATS = ("text", "json_object", "json_schema")


def checked(kept: Mapping[str, Any], unknown: list[str]) -> dict[str, Any]:
    """The fields of this module, as `ChatRequest` holds them. Raises what they raise."""
    found: dict[str, Any] = {}
    if "response_format" in kept:
        found["response_format"] = response_format(kept["response_format"], unknown)
    if "tools" in kept:
        found["tools"] = tools(kept["tools"], unknown)
    if "tool_choice" in kept:
        names = [tool["function"]["name"] for tool in found.get("tools", ())]
        found["tool_choice"] = tool_choice(kept["tool_choice"], names)
    return found


def of_message(
    where: str, role: str, kept: Mapping[str, Any], unknown: list[str]
) -> dict[str, Any]:
    """What a message has to do with tools and thoughts. Raises what `calls` raises."""
    found: dict[str, Any] = {}
    owners = {
        "tool_calls": "assistant",
        "reasoning_content": "assistant",
        "tool_call_id": "tool",
    }
    for name, owner in owners.items():
        if name in kept and role != owner:
            raise InvalidRequest(
                f"{where}.{name} is for messages of the role {owner}", param=f"{where}.{name}"
            )
    if role == "tool":
        found["tool_call_id"] = _text(f"{where}.tool_call_id", kept.get("tool_call_id"))
    if "reasoning_content" in kept:
        text = _text(f"{where}.reasoning_content", kept["reasoning_content"])
        found["reasoning_content"] = text
    if kept.get("tool_calls"):
        found["tool_calls"] = calls(f"{where}.tool_calls", kept["tool_calls"], unknown)
    return found


def response_format(given: Any, unknown: list[str]) -> dict[str, Any] | None:
    """`schema` (None: any object) and `strict`; None for plain text. Raises InvalidRequest."""
    where = "response_format"
    wanted = _object(where, given)
    found = wanted.get("type")
    if found not in _FORMATS:
        raise _other(f"{where}.type", found, _FORMATS)
    kept, names = fields.keep_done(wanted, {"type", "json_schema"}, (), {}, f"{where}.")
    unknown += names
    if found != "json_schema":
        return None if found == "text" else {"schema": None, "strict": True}
    where = f"{where}.json_schema"
    if "json_schema" not in kept:
        raise InvalidRequest(f"{where} is missing", param=where)
    done = {"name", "schema", "strict"}
    inner, names = fields.keep_done(
        _object(where, kept["json_schema"]), done, {"description"}, {}, f"{where}."
    )
    unknown += names
    _name(f"{where}.name", inner.get("name"))
    schema = inner.get("schema")
    if schema is not None:
        _object(f"{where}.schema", schema)
    return {"schema": schema, "strict": _flag(f"{where}.strict", inner.get("strict", False))}


def tools(given: Any, unknown: list[str]) -> tuple[dict[str, Any], ...]:
    """The functions that may be called. Raises InvalidRequest, UnsupportedParameter."""
    found = tuple(
        _tool(f"tools[{at}]", item, unknown) for at, item in enumerate(_array("tools", given))
    )
    names = [tool["function"]["name"] for tool in found]
    for at, name in enumerate(names):
        if name in names[:at]:
            raise InvalidRequest(f"two tools are called {name}", param=f"tools[{at}].function.name")
    return found


def _tool(where: str, given: Any, unknown: list[str]) -> dict[str, Any]:
    wanted = _object(where, given)
    _function_type(where, wanted)
    kept, names = fields.keep_done(wanted, {"type", "function"}, (), {}, f"{where}.")
    unknown += names
    where = f"{where}.function"
    if "function" not in kept:
        raise InvalidRequest(f"{where} is missing", param=where)
    done = {"name", "description", "parameters", "strict"}
    function, names = fields.keep_done(_object(where, kept["function"]), done, (), {}, f"{where}.")
    unknown += names
    _name(f"{where}.name", function.get("name"))
    if "description" in function:
        _text(f"{where}.description", function["description"])
    if "parameters" in function:
        _object(f"{where}.parameters", function["parameters"])
    _flag(f"{where}.strict", function.get("strict", False))
    return {"type": "function", "function": function}


def tool_choice(given: Any, names: list[str]) -> str | tuple[str]:
    """One of CHOICES, or the name of the tool to call in a tuple. Raises InvalidRequest."""
    where = "tool_choice"
    if isinstance(given, str):
        if given not in CHOICES:
            raise _other(where, given, CHOICES)
        if given == "required" and not names:
            raise InvalidRequest("tool_choice is required, but there are no tools", param=where)
        return given
    wanted = _object(where, given)
    _function_type(where, wanted)
    function = _object(f"{where}.function", wanted.get("function"))
    name = _name(f"{where}.function.name", function.get("name"))
    if name not in names:
        raise InvalidRequest(
            f"tool_choice is {name}, which is not among the tools", param=f"{where}.function.name"
        )
    return (name,)


def calls(where: str, given: Any, unknown: list[str]) -> list[dict[str, Any]]:
    """Earlier calls of an assistant's message, arguments as objects, as chat templates want them.

    Raises InvalidRequest, UnsupportedParameter.
    """
    found = _array(where, given, MAX_CALLS)
    return [_call(f"{where}[{at}]", item, unknown) for at, item in enumerate(found)]


def _call(where: str, given: Any, unknown: list[str]) -> dict[str, Any]:
    wanted = _object(where, given)
    _function_type(where, wanted)
    kept, names = fields.keep_done(wanted, {"id", "type", "function"}, {"index"}, {}, f"{where}.")
    unknown += names
    id_ = _text(f"{where}.id", kept.get("id"))
    function, names = fields.keep_done(
        _object(f"{where}.function", kept.get("function")),
        {"name", "arguments"},
        (),
        {},
        f"{where}.function.",
    )
    unknown += names
    name = _name(f"{where}.function.name", function.get("name"))
    text = _text(f"{where}.function.arguments", function.get("arguments"))
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(
            f"{where}.function.arguments is not the text of a JSON object",
            param=f"{where}.function.arguments",
        )
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def _function_type(where: str, given: Mapping[str, Any]) -> None:
    if given.get("type") != "function":
        found = given.get("type")
        name = short(found) if isinstance(found, str) else "missing"
        raise UnsupportedParameter(
            f"{where}.type is {name}; this server takes function only", param=f"{where}.type"
        )


def _array(where: str, given: Any, most: int = MAX_TOOLS) -> list[Any]:
    if not isinstance(given, list):
        raise _wrong(where, "an array", given)
    if len(given) > most:
        raise InvalidRequest(f"{where} has {len(given)} entries; {most} are allowed", param=where)
    return given


def _object(where: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise _wrong(where, "an object", given)
    return given


def _text(where: str, given: Any) -> str:
    if not isinstance(given, str):
        raise _wrong(where, "a string", given)
    return given


def _flag(where: str, given: Any) -> bool:
    if not isinstance(given, bool):
        raise _wrong(where, "true or false", given)
    return given


def _name(where: str, given: Any) -> str:
    if not NAME.fullmatch(_text(where, given)):
        raise InvalidRequest(
            f"{where} is {short(given)}; give 1 to 64 letters, digits, - and _", param=where
        )
    return str(given)


def _other(where: str, given: Any, wanted: tuple[str, ...]) -> InvalidRequest:
    found = "missing" if given is None else short(given) if isinstance(given, str) else kind(given)
    return InvalidRequest(f"{where} is {found}; give one of {', '.join(wanted)}", param=where)


def _wrong(where: str, wanted: str, given: Any) -> InvalidRequest:
    if given is None:
        return InvalidRequest(f"{where} is missing", param=where)
    return InvalidRequest(f"{where} must be {wanted}, not {kind(given)}", param=where)
