"""From the form that a chat request asks for to a grammar, and from an answer's parts to JSON."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from typing import Any

from service.errors import InvalidRequest
from service.errors import UnsupportedParameter
from service.text.answer import AnswerReader
from service.text.answer import Delta
from service.text.answer import Reading
from service.text.answer import reading
from service.text.answer import thinking
from service.text.constraints import grammars
from service.text.constraints import json_grammar
from service.text.stream import Step
from service.text.tools import forced_calls
from service.text.tools import tool_use
from service.web.schemas import ChatRequest

if TYPE_CHECKING:
    from service.deployment import Serving
    from service.text.constraints import TokenConstraint

FORMAT = "response_format"
SCHEMA = "response_format.json_schema.schema"


def tools_of(request: ChatRequest, serving: "Serving") -> tuple[Mapping[str, Any], ...]:
    """The tools that the model is shown and may call; none with tool_choice none.

    Raises UnsupportedParameter, naming the field, when the model's chat template does not know
    what the request has of tools: it would leave it out in silence.
    """
    _check_history(request, serving)
    if not request.tools or request.tool_choice == "none":
        return ()
    use = tool_use(serving.tokenizer)
    own = getattr(serving.tokenizer, "response_template", None)
    readable = use.format is not None or (own is not None and "tool_calls" in own["fields"])
    if not use.shown or not readable:
        lacks = "does not show tools" if not use.shown else "calls tools in a form unknown here"
        raise UnsupportedParameter(
            f"the chat template of this model {lacks}, so it cannot use them",
            param="tools",
            hint="leave tools out, or serve a model that was trained to call them",
        )
    if request.tool_choice != "auto" and use.format is None:
        raise UnsupportedParameter(
            "this model does not write its calls as JSON, so none can be forced",
            param="tool_choice",
            hint="leave tool_choice out, or send auto or none",
        )
    return tuple(_shown(tool) for tool in request.tools)


def _shown(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Without `strict`, which is for the server."""
    function = {name: value for name, value in tool["function"].items() if name != "strict"}
    return {"type": "function", "function": function}


def _check_history(request: ChatRequest, serving: "Serving") -> None:
    for at, message in enumerate(request.messages):
        called, result = "tool_calls" in message, message["role"] == "tool"
        if not called and not result:
            continue
        use = tool_use(serving.tokenizer)
        if not (use.calls if called else use.results):
            field = f"messages[{at}].{'tool_calls' if called else 'role'}"
            raise UnsupportedParameter(
                f"{field}: the chat template of this model knows no tools", param=field
            )


def constraint(
    request: ChatRequest, serving: "Serving", prompt: str
) -> tuple[Callable[[], "TokenConstraint"] | None, list[str]]:
    """What makes the constraint of each answer, and the schemas' keywords that it leaves out.

    prompt: as rendered. Compiles; the same grammar is compiled once. Raises InvalidRequest,
    Overloaded.
    """
    forced = bool(request.tools) and request.tool_choice not in ("auto", "none")
    wanted = request.response_format
    strict = _strict_auto(request)
    if not forced and wanted is None and not strict:
        return None, []
    param = "tools" if forced or strict else FORMAT
    if request.ignore_eos:
        raise InvalidRequest(
            f"ignore_eos does not go with {param}, which says where the answer ends",
            param="ignore_eos",
        )
    if wanted is not None and request.tools and request.tool_choice != "none":
        raise UnsupportedParameter(
            "response_format does not go with tools here; a call and a format exclude each other",
            param=FORMAT,
            hint="send tool_choice none for the answer that has the format",
        )
    thoughts = thinking(prompt)
    if wanted is not None:
        param = FORMAT if wanted["schema"] is None else SCHEMA
        text = json_grammar(
            wanted["schema"], strict=wanted["strict"], thinking=thoughts, param=param
        )
    else:
        text = _calls(request, serving, thoughts, forced)
    made = grammars(serving.tokenizer, serving.vocabulary, serving.stop_ids).compile(text, param)
    stops = frozenset(request.stop_token_ids)
    where = "tools" if wanted is None else SCHEMA
    return lambda: made.constraint(stops), [f"{where}.{name}" for name in made.ignored]


def _strict_auto(request: ChatRequest) -> bool:
    """Whether calls that the model is free to make must follow their schemas."""
    strict = any(tool["function"].get("strict") for tool in request.tools)
    return strict and request.tool_choice == "auto"


def _calls(request: ChatRequest, serving: "Serving", thoughts: bool, forced: bool) -> str:
    form = tool_use(serving.tokenizer).format
    if form is None:
        raise UnsupportedParameter(
            "this model does not write its calls as JSON, so they cannot be strict",
            param="tools",
            hint="leave strict out of the tools",
        )
    tools = [
        tool
        for tool in request.tools
        if isinstance(request.tool_choice, str) or tool["function"]["name"] in request.tool_choice
    ]
    # One tool by name is one call of it.
    parallel = request.parallel_tool_calls and isinstance(request.tool_choice, str)
    return forced_calls(
        serving.tokenizer,
        form,
        tools,
        parallel=parallel,
        thinking=thoughts,
        free=not forced,
        param="tools",
    )


def reading_of(request: ChatRequest, serving: "Serving", prompt: str) -> Reading | None:
    """How answers are taken apart; None if they are plain text."""
    free = request.tool_choice != "none"
    return reading(serving.tokenizer, prompt, request.tools if free else ())


# --- answers


def read(reader: AnswerReader, steps: Iterable[Step]) -> list[Delta]:
    """What an answer says with these steps, with what belongs together in one piece."""
    found: list[Delta] = []
    for text, tokens in steps:
        for delta in reader.feed(text, tokens):
            joined = _joined(found[-1], delta) if found else None
            if joined is None:
                found.append(delta)
            else:
                found[-1] = joined
    return found


def _joined(one: Delta, two: Delta) -> Delta | None:
    """Two deltas as one; None if they are not of the same thing."""
    if one.content and two.content:
        return Delta(content=one.content + two.content)
    if one.reasoning and two.reasoning:
        return Delta(reasoning=one.reasoning + two.reasoning)
    if one.call is None or two.call is None or two.call.name is not None:
        return None
    return Delta(call=replace(one.call, arguments=one.call.arguments + two.call.arguments))


def delta_of(deltas: Iterable[Delta]) -> dict[str, Any]:
    """Deltas as one `delta` of a chunk."""
    found: dict[str, Any] = {}
    entries: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if delta.content:
            found["content"] = found.get("content", "") + delta.content
        if delta.reasoning:
            found["reasoning_content"] = found.get("reasoning_content", "") + delta.reasoning
        if delta.call is not None:
            call = delta.call
            entry = entries.setdefault(call.index, {"index": call.index, "function": {}})
            if call.name is not None:
                entry |= {"id": call.id, "type": "function", "function": {"name": call.name}}
            function = entry["function"]
            function["arguments"] = function.get("arguments", "") + call.arguments
    if entries:
        found["tool_calls"] = list(entries.values())
    return found


def message_of(deltas: Sequence[Delta]) -> dict[str, Any]:
    """All deltas of an answer as a whole message. Text is null if there are calls only."""
    found = delta_of(deltas)
    calls = [
        {name: value for name, value in call.items() if name != "index"}
        for call in found.get("tool_calls", ())
    ]
    text = found.get("content", None if calls else "")
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if "reasoning_content" in found:
        message["reasoning_content"] = found["reasoning_content"]
    if calls:
        message["tool_calls"] = calls
    return message
