"""The input of a request to /v1/responses: items, and the messages that they are in a chat."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidRequest
from service.web import formats
from service.web import schemas
from service.web.shapes import Array
from service.web.shapes import Either
from service.web.shapes import Object
from service.web.shapes import Tagged
from service.web.values import Choice
from service.web.values import Only
from service.web.values import Text

# (number of a message, its key) -> where that stands in the request
Origins = Mapping[tuple[int, str], str]

ROLES = ("user", "assistant", "system", "developer")
OTHER_PARTS = ("computer_screenshot", "input_audio", "input_file", "input_image", "refusal")
# what belongs to tools of other kinds, or to what a server has stored
OTHER_ITEMS = (
    "additional_tools",
    "apply_patch_call",
    "apply_patch_call_output",
    "code_interpreter_call",
    "compaction",
    "compaction_trigger",
    "computer_call",
    "computer_call_output",
    "configuration_update",
    "custom_tool_call",
    "custom_tool_call_output",
    "file_search_call",
    "image_generation_call",
    "item_reference",
    "local_shell_call",
    "local_shell_call_output",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "program",
    "program_output",
    "shell_call",
    "shell_call_output",
    "tool_search_call",
    "tool_search_output",
    "web_search_call",
)
DIRECT = ({"type": "direct"},)


def _part(name: str, *harmless: str) -> Object:
    return Object({"type": Only(name), "text": Text()}, ["type", "text"], harmless)


INPUT_TEXT = _part("input_text", "prompt_cache_breakpoint")
CONTENT = Either(
    (
        Text(),
        Array(
            Tagged(
                "type",
                {
                    "input_text": INPUT_TEXT,
                    "output_text": _part("output_text", "annotations", "logprobs"),
                },
                not_done=OTHER_PARTS,
            )
        ),
    ),
    wanted="a string or an array of text parts",
)
OUTPUT = Either(
    (Text(), Array(Tagged("type", {"input_text": INPUT_TEXT}, not_done=OTHER_PARTS))),
    wanted="a string or an array of text parts",
)
ITEMS: Mapping[str, Object] = {
    "message": Object(
        {"type": Only("message"), "role": Choice(ROLES), "content": CONTENT},
        ["role", "content"],
        harmless={"id", "phase", "status"},
    ),
    "function_call": Object(
        {
            "type": Only("function_call"),
            "call_id": Text(),
            "name": formats.NAME,
            "arguments": Text(more={"contentMediaType": "application/json"}),
        },
        ["type", "call_id", "name", "arguments"],
        harmless={"id", "status"},
        not_done={"async": (False,), "caller": DIRECT, "namespace": ()},
    ),
    "function_call_output": Object(
        {"type": Only("function_call_output"), "call_id": Text(), "output": OUTPUT},
        ["type", "call_id", "output"],
        harmless={"id", "name", "status"},
        not_done={"caller": DIRECT, "namespace": ()},
    ),
    "reasoning": Object(
        {
            "type": Only("reasoning"),
            "content": Array(Tagged("type", {"reasoning_text": _part("reasoning_text")})),
            "summary": Array(Tagged("type", {"summary_text": _part("summary_text")})),
        },
        ["type"],
        harmless={"id", "status"},
        not_done={"encrypted_content": ()},
    ),
}


class Items(Tagged):
    """An item of the input. One without a type is a message."""

    def check(self, where: str, given: Any, unknown: list[str]) -> dict[str, Any]:
        if isinstance(given, dict) and given.get("type") is None:
            given = {**given, "type": "message"}
        return super().check(where, given, unknown)


INPUT = Either(
    (
        Text(),
        Array(Items("type", ITEMS, not_done=OTHER_ITEMS), least=1, most=schemas.MAX_MESSAGES),
    ),
    wanted="a string or an array of items",
)


def messages(
    instructions: str | None, given: str | Sequence[Mapping[str, Any]]
) -> tuple[tuple[dict[str, Any], ...], Origins]:
    """An input that has its shape as messages for the chat template.

    Thoughts, text and calls of one turn are one message. Raises InvalidRequest for an output of a
    call that is not there.
    """
    found = _Conversation([], {}, {})
    if instructions is not None:
        found.add("instructions", "system", {"content": instructions})
    if isinstance(given, str):
        found.add("input", "user", {"content": given})
        return tuple(found.messages), found.origins
    counted = [item.get(key) for item in given for key in ("content", "summary", "output")]
    parts = sum(len(value) for value in counted if isinstance(value, list))
    if parts > schemas.MAX_PARTS:
        raise InvalidRequest(
            f"the input has {parts} content parts; {schemas.MAX_PARTS} are allowed", param="input"
        )
    for at, item in enumerate(given):
        found.take(f"input[{at}]", item)
    return tuple(found.messages), found.origins


@dataclass
class _Conversation:
    """Messages so far. calls: names of the functions that were called, by the id of the call."""

    messages: list[dict[str, Any]]
    origins: dict[tuple[int, str], str]
    calls: dict[str, str]

    def take(self, where: str, item: Mapping[str, Any]) -> None:
        if item["type"] == "function_call_output":
            self._result(where, item)
        elif item["type"] == "function_call":
            self._call(where, item)
        elif item["type"] == "reasoning":
            self._thought(where, item)
        elif item["role"] == "assistant":
            self._answer(f"{where}.content", _text(item["content"]))
        else:
            content = {"content": _text(item["content"])}
            self.add(f"{where}.content", schemas.ROLES[item["role"]], content)

    def add(self, where: str, role: str, rest: Mapping[str, Any]) -> None:
        """One more message, all of which comes from one place."""
        self.messages.append({"role": role, **rest})
        for key in self.messages[-1]:
            self._came("role" if key == "role" else key, where)

    def _result(self, where: str, item: Mapping[str, Any]) -> None:
        name = self.calls.get(item["call_id"])
        if name is None:
            raise InvalidRequest(
                f"{where}.call_id: no function_call before it has this id",
                param=f"{where}.call_id",
                hint="nothing is stored here; send the whole conversation in input",
            )
        result = {"tool_call_id": item["call_id"], "name": name, "content": _text(item["output"])}
        self.add(f"{where}.output", "tool", result)

    def _call(self, where: str, item: Mapping[str, Any]) -> None:
        arguments = formats.arguments(f"{where}.arguments", item["arguments"])
        self.calls[item["call_id"]] = item["name"]
        turn = self._turn(where)
        function = {"name": item["name"], "arguments": arguments}
        call = {"id": item["call_id"], "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
        self._came("tool_calls", where)

    def _thought(self, where: str, item: Mapping[str, Any]) -> None:
        """Only thoughts follow each other within a turn; after anything else a new one begins."""
        text = _text(item.get("content") or item.get("summary") or [])
        if not text:
            return
        turn = self._turn(where)
        if turn["content"] or "tool_calls" in turn:
            turn = self._new_turn(where)
        before = turn.get("reasoning_content")
        turn["reasoning_content"] = text if before is None else f"{before}\n{text}"
        self._came("reasoning_content", where)

    def _answer(self, where: str, text: str) -> None:
        turn = self._turn(where)
        if turn["content"]:
            turn = self._new_turn(where)
        turn["content"] = text
        self._came("content", where)

    def _turn(self, where: str) -> dict[str, Any]:
        """The message of the assistant that is being put together."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[-1]
        return self._new_turn(where)

    def _new_turn(self, where: str) -> dict[str, Any]:
        self.add(where, "assistant", {"content": ""})
        return self.messages[-1]

    def _came(self, key: str, where: str) -> None:
        self.origins[len(self.messages) - 1, key] = where


def _text(given: str | Sequence[Mapping[str, Any]]) -> str:
    return given if isinstance(given, str) else "\n".join(part["text"] for part in given)
