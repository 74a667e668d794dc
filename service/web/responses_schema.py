"""The body of a request to /v1/responses: its shape, and the chat that it asks for."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from service.errors import InvalidRequest
from service.web import fields
from service.web import formats
from service.web import responses_items
from service.web import schemas
from service.web.responses_items import Origins
from service.web.shapes import Array
from service.web.shapes import Either
from service.web.shapes import Object
from service.web.shapes import Table
from service.web.shapes import Tagged
from service.web.values import AnyObject
from service.web.values import Choice
from service.web.values import Flag
from service.web.values import Only
from service.web.values import Shape
from service.web.values import Text
from service.web.values import Typed

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16
METADATA_NAME = r"[\s\S]{0,64}"
METADATA_CHARACTERS = 512
# the server's own tools at OpenAI, and kinds of tools that a chat template cannot be shown
OTHER_TOOLS = (
    "apply_patch",
    "code_interpreter",
    "computer",
    "computer_use",
    "computer_use_preview",
    "custom",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "namespace",
    "programmatic_tool_calling",
    "shell",
    "tool_search",
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
)

FUNCTION = Object(
    {
        "type": Only("function"),
        "name": formats.NAME,
        "description": Text(),
        "parameters": AnyObject(),
        "strict": Flag(),
    },
    ["type", "name"],
    not_done={
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    },
)
TOOLS = Array(Tagged("type", {"function": FUNCTION}, not_done=OTHER_TOOLS), most=formats.MAX_TOOLS)
NAMED = Object({"type": Only("function"), "name": formats.NAME}, ["type", "name"])
ALLOWED = Object(
    {
        "type": Only("allowed_tools"),
        "mode": Choice(("auto", "required")),
        "tools": Array(
            Tagged("type", {"function": NAMED}, not_done=OTHER_TOOLS),
            least=1,
            most=formats.MAX_TOOLS,
        ),
    },
    ["type", "mode", "tools"],
)
TOOL_CHOICE = Either(
    (
        Choice(("auto", "none", "required")),
        Tagged("type", {"function": NAMED, "allowed_tools": ALLOWED}, not_done=OTHER_TOOLS),
    ),
    wanted="a string or an object",
)
FORMAT = Tagged(
    "type",
    {
        "text": Object({"type": Only("text")}, ["type"]),
        "json_object": Object({"type": Only("json_object")}, ["type"]),
        "json_schema": Object(
            {
                "type": Only("json_schema"),
                "name": formats.NAME,
                "schema": AnyObject(),
                "strict": Flag(),
            },
            ["type", "name", "schema"],
            harmless={"description"},
        ),
    },
)
TEXT = Object({"format": FORMAT}, not_done={"verbosity": ("medium",)})
REASONING = Object(
    {},
    not_done={
        "context": ("auto",),
        "effort": (),
        "generate_summary": (),
        "mode": ("standard",),
        "summary": (),
    },
)


class ResponseRequest(schemas.ChatRequest):
    """A chat, and what of the request the response repeats."""

    max_output_tokens: int | None = Field(None, ge=1, le=schemas.INT32_MAX)
    repeated: Mapping[str, Any] = Field(default_factory=dict)

    @property
    def limit(self) -> int | None:
        return self.max_output_tokens


@dataclass(frozen=True)
class Asked:
    """A checked request.

    lenient: the same with tools that need not be strict, None if there is no difference. origins:
    where its messages come from. tools: where its tools stand in the request.
    """

    request: ResponseRequest
    lenient: ResponseRequest | None
    origins: Origins
    tools: Sequence[int]


_OF_A_CHAT = (
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "min_p",
    "min_tokens",
    "model",
    "parallel_tool_calls",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "stream",
    "temperature",
    "top_k",
    "top_logprobs",
    "top_p",
)
_SHAPES: dict[str, Shape] = {
    "model": Typed(ResponseRequest, "model"),
    "input": responses_items.INPUT,
    "instructions": Text(),
    "include": Array(Only(LOGPROBS)),
    "max_output_tokens": Typed(ResponseRequest, "max_output_tokens"),
    "metadata": Table(
        METADATA_NAME,
        "name of at most 64 characters",
        Text(most=METADATA_CHARACTERS),
        most=MAX_METADATA,
    ),
    "reasoning": REASONING,
    "stream_options": Object({}, harmless=fields.STREAM_OPTIONS_HARMLESS, said="For streams only."),
    "text": TEXT,
    "tool_choice": TOOL_CHOICE,
    "tools": TOOLS,
}
RESPONSE = Object(
    _SHAPES
    | {
        name: schemas.SHARED.get(name, Typed(ResponseRequest, name))
        for name in _OF_A_CHAT
        if name not in _SHAPES
    },
    ["model", "input"],
    fields.RESPONSE_HARMLESS,
    fields.RESPONSE_NOT_DONE,
)


def response_request(body: Mapping[str, Any]) -> tuple[Asked, list[str]]:
    """What a request asks for, and its names that nobody specifies. Raises InvalidRequest."""
    unknown: list[str] = []
    kept = RESPONSE.check("", body, unknown)
    messages, origins = responses_items.messages(kept.get("instructions"), kept["input"])
    tools = kept.get("tools", [])
    choice, places = _choice(kept.get("tool_choice", "auto"), [tool["name"] for tool in tools])
    logprobs = bool(kept.get("include"))
    if kept.get("top_logprobs") and not logprobs:
        raise InvalidRequest(
            f"top_logprobs is for answers with logprobs; put {LOGPROBS} into include",
            param="top_logprobs",
        )
    wanted: dict[str, Any] = {
        **{name: kept[name] for name in _OF_A_CHAT if name in kept},
        **{n: kept[n] for n in ("max_output_tokens", "stream_options") if n in kept},
        "messages": messages,
        "logprobs": logprobs,
        "response_format": _format(kept.get("text", {}).get("format", {"type": "text"})),
        "tool_choice": choice,
        "tools": _tools([tools[at] for at in places], otherwise=True),
        "repeated": _repeated(kept),
    }
    request = schemas.checked(ResponseRequest, wanted)
    lenient = request.model_copy(
        update={"tools": _tools([tools[at] for at in places], otherwise=False)}
    )
    differs = request.tools != lenient.tools
    return Asked(request, lenient if differs else None, origins, places), unknown


def _choice(given: Any, names: Sequence[str]) -> tuple[str | tuple[str], Sequence[int]]:
    """tool_choice as a chat has it, and the tools that may be called, by their places."""
    for at, name in enumerate(names):
        if name in names[:at]:
            raise InvalidRequest(f"two tools are called {name}", param=f"tools[{at}].name")
    if isinstance(given, str):
        if given == "required" and not names:
            raise InvalidRequest(
                "tool_choice is required, but there are no tools", param="tool_choice"
            )
        return given, range(len(names))
    if given["type"] == "function":
        _check_name("tool_choice", given["name"], names)
        return (given["name"],), range(len(names))
    for at, tool in enumerate(given["tools"]):
        _check_name(f"tool_choice.tools[{at}]", tool["name"], names)
    allowed = {tool["name"] for tool in given["tools"]}
    return given["mode"], [at for at, name in enumerate(names) if name in allowed]


def _check_name(where: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise InvalidRequest(
            f"{where} is {name}, which is not among the tools", param=f"{where}.name"
        )


def _format(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """`schema` (None: any object) and `strict`; None for plain text."""
    if given["type"] == "text":
        return None
    return {"schema": given.get("schema"), "strict": given.get("strict", "schema" not in given)}


def _tools(given: Sequence[Mapping[str, Any]], *, otherwise: bool) -> tuple[dict[str, Any], ...]:
    """As a chat has them. otherwise: what `strict` is where a tool does not say."""
    found = []
    for tool in given:
        function = {name: value for name, value in tool.items() if name != "type"}
        found.append({"type": "function", "function": {"strict": otherwise, **function}})
    return tuple(found)


def _repeated(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What of a request its response repeats."""
    blank: dict[str, Any] = {"description": None, "parameters": None, "strict": True}
    form = kept.get("text", {}).get("format", {"type": "text"})
    return {
        "instructions": kept.get("instructions"),
        "max_output_tokens": kept.get("max_output_tokens"),
        "metadata": kept.get("metadata", {}),
        "text": {"format": form},
        "tool_choice": kept.get("tool_choice", "auto"),
        "tools": [{**blank, **tool} for tool in kept.get("tools", [])],
    }
