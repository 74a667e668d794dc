"""What a request says about the form of its answer: response_format, tools and tool_choice."""

import json
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from service.errors import InvalidRequest
from service.web.shapes import Array
from service.web.shapes import Either
from service.web.shapes import Object
from service.web.shapes import Tagged
from service.web.values import AnyObject
from service.web.values import Choice
from service.web.values import Flag
from service.web.values import Only
from service.web.values import Text

MAX_TOOLS = 128
MAX_CALLS = 128  # in one message

NAME = Text(pattern="[A-Za-z0-9_-]{1,64}", said="1 to 64 letters, digits, - and _")
RESPONSE_FORMAT = Tagged(
    "type",
    {
        "text": Object({"type": Only("text")}, ["type"]),
        "json_object": Object({"type": Only("json_object")}, ["type"]),
        "json_schema": Object(
            {
                "type": Only("json_schema"),
                "json_schema": Object(
                    {"name": NAME, "schema": AnyObject(), "strict": Flag()},
                    ["name"],
                    harmless={"description"},
                ),
            },
            ["type", "json_schema"],
        ),
    },
)
TOOLS = Array(
    Object(
        {
            "type": Only("function"),
            "function": Object(
                {
                    "name": NAME,
                    "description": Text(),
                    "parameters": AnyObject(),
                    "strict": Flag(),
                },
                ["name"],
            ),
        },
        ["type", "function"],
    ),
    most=MAX_TOOLS,
)
TOOL_CHOICE = Either(
    (
        Choice(("auto", "none", "required")),
        Object(
            {"type": Only("function"), "function": Object({"name": NAME}, ["name"])},
            ["type", "function"],
        ),
    ),
    wanted="a string or an object",
)
CALLS = Array(
    Object(
        {
            "type": Only("function"),
            "id": Text(),
            "function": Object(
                {
                    "name": NAME,
                    "arguments": Text(more={"contentMediaType": "application/json"}),
                },
                ["name", "arguments"],
            ),
        },
        ["type", "id", "function"],
        harmless={"index"},
    ),
    most=MAX_CALLS,
)


def read(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of this module, as `ChatRequest` holds them, of a body that has its shape.

    Raises InvalidRequest.
    """
    found: dict[str, Any] = {}
    if "response_format" in kept:
        found["response_format"] = _response_format(kept["response_format"])
    if "tools" in kept:
        found["tools"] = _tools(kept["tools"])
    if "tool_choice" in kept:
        names = [tool["function"]["name"] for tool in found.get("tools", ())]
        found["tool_choice"] = _tool_choice(kept["tool_choice"], names)
    return found


def calls(where: str, given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Earlier calls of an assistant's message, arguments as objects, as chat templates want them.

    Raises InvalidRequest.
    """
    return [_call(f"{where}[{at}].function", item) for at, item in enumerate(given)]


def _response_format(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """`schema` (None: any object) and `strict`; None for plain text."""
    if given["type"] == "text":
        return None
    wanted = given.get("json_schema", {"strict": True})
    return {"schema": wanted.get("schema"), "strict": wanted.get("strict", False)}


def _tools(given: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    names = [tool["function"]["name"] for tool in given]
    for at, name in enumerate(names):
        if name in names[:at]:
            raise InvalidRequest(f"two tools are called {name}", param=f"tools[{at}].function.name")
    return tuple(given)


def _tool_choice(given: Any, names: Sequence[str]) -> str | tuple[str]:
    """One of the words, or the name of the tool to call in a tuple."""
    where = "tool_choice"
    if isinstance(given, str):
        if given == "required" and not names:
            raise InvalidRequest("tool_choice is required, but there are no tools", param=where)
        return given
    name = given["function"]["name"]
    if name not in names:
        raise InvalidRequest(
            f"tool_choice is {name}, which is not among the tools", param=f"{where}.function.name"
        )
    return (name,)


def arguments(where: str, text: str) -> dict[str, Any]:
    """Those of an earlier call. Raises InvalidRequest for what is not the text of an object."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidRequest(f"{where} is not the text of a JSON object", param=where)
    return found


def _call(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    function = given["function"]
    found = arguments(f"{where}.arguments", function["arguments"])
    called = {"name": function["name"], "arguments": found}
    return {"id": given["id"], "type": "function", "function": called}
