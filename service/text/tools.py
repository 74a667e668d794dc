"""How a model calls tools: learned from its chat template, forced by a grammar.

Chat templates show earlier calls as the model was trained to write them. A conversation with
invented calls is rendered, and what stands around their names and arguments is the model's format.
"""

import functools
import json
import re
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

from service.errors import InvalidRequest
from service.errors import UnsupportedParameter
from service.text import templates
from service.text.chat import vocabulary
from service.text.constraints import LARK
from service.text.constraints import THOUGHT
from service.text.constraints import THOUGHT_RULES
from service.text.constraints import WHITESPACE
from service.text.constraints import check_schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}

MAX_CALLS = 16
_NAMES = ("moorage_probe_one", "moorage_probe_two")
_ARGUMENTS = ({"moorage_probe_key": "first value"}, {"moorage_probe_key": "second value"})
_IDS = ("moorage01", "moorage02")  # nine letters and digits, which Mistral's templates demand
_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_OPENED = re.compile(r"<think>\s*\Z")


@dataclass(frozen=True)
class ToolFormat:
    """opening call (joint call)* closing, where a call is: before NAME between ARGUMENTS after.

    joint: None if the template takes one call in an answer only. All as text, control tokens
    included.
    """

    opening: str
    before: str
    between: str
    after: str
    joint: str | None
    closing: str

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls, name and arguments as JSON text, as the model would write them."""
        texts = [self.before + name + self.between + args + self.after for name, args in calls]
        return self.opening + (self.joint or "").join(texts) + self.closing


@dataclass(frozen=True)
class ToolUse:
    """What a model's template says about tools.

    shown: it shows the model which tools there are. calls: it shows the model its earlier calls.
    results: it shows messages of the role tool. format: how the model calls, None if that is not
    JSON that could be forced.
    """

    shown: bool
    calls: bool
    results: bool
    format: ToolFormat | None


# Keeps the last models'; a server has one, and two while it changes models.
@functools.lru_cache(maxsize=2)
def tool_use(tokenizer: "PreTrainedTokenizerBase") -> ToolUse:
    """Found by rendering. Never raises: a template that fails on tools knows none."""
    user = {"role": "user", "content": "moorage"}
    answer = _call_message(1)
    tools = [_probe_tool(name) for name in _NAMES]
    asked = _render(tokenizer, [user], tools, prompt=True)
    called = _render(tokenizer, [user, answer], tools)
    result = {
        "role": "tool",
        "tool_call_id": _IDS[0],
        "name": _NAMES[0],
        "content": "moorage_result",
    }
    answered = _render(tokenizer, [user, answer, result], tools, prompt=True)
    calls = called is not None and _ARGUMENTS[0]["moorage_probe_key"] in called
    found = None
    if asked is not None and called is not None and calls:
        twice = _render(tokenizer, [user, _call_message(2)], tools)
        found = _format(tokenizer, asked, called, twice)
    return ToolUse(
        shown=asked is not None and _NAMES[0] in asked,
        calls=calls,
        results=answered is not None and "moorage_result" in answered and calls,
        format=found,
    )


def _probe_tool(name: str) -> Tool:
    string = {"type": "string", "description": "A value."}
    parameters = {
        "type": "object",
        "properties": {"moorage_probe_key": string},
        "required": ["moorage_probe_key"],
    }
    function = {"name": name, "description": "Nothing.", "parameters": parameters}
    return {"type": "function", "function": function}


def _call_message(count: int) -> dict[str, Any]:
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
        for id_, name, arguments in zip(_IDS, _NAMES, _ARGUMENTS, strict=True)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls[:count]}


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    tools: list[Tool],
    *,
    prompt: bool = False,
) -> str | None:
    try:
        return templates.render(tokenizer, messages, tools, prompt=prompt)
    except InvalidRequest:
        return None


def _format(
    tokenizer: "PreTrainedTokenizerBase", asked: str, called: str, twice: str | None
) -> ToolFormat | None:
    """From a prompt, the same with one call, and with two."""
    asked = _OPENED.sub("", asked)  # what follows there is thoughts, not a call
    one = _THOUGHT.sub("", called[len(_common(asked, called)) :])
    first = _parts(one, 0)
    if first is None:
        return None
    before, between, end = first
    control = vocabulary(tokenizer).control
    tail = one[end:]
    stop = control.search(tail.lstrip()) if control is not None else None
    joint = None
    if twice is not None:
        two = _THOUGHT.sub("", twice[len(_common(asked, twice)) :])
        joint = _joint(one, two, first)
    if joint is None:
        after = tail.lstrip()[: stop.start()] if stop is not None else tail
        return _proven(ToolFormat("", before, between, after.rstrip(), None, ""))
    after, middle, call = joint
    opening = before[: len(before) - len(call)]
    rest = tail[len(after) :]
    ends = control.search(rest) if control is not None else None
    closing = rest[: ends.start()] if ends is not None else rest
    return _proven(ToolFormat(opening, call, between, after, middle, closing.rstrip()))


def _common(one: str, two: str) -> str:
    """What both begin with."""
    pairs = enumerate(zip(one, two, strict=False))
    end = next((at for at, (a, b) in pairs if a != b), min(len(one), len(two)))
    return one[:end]


def _parts(text: str, which: int) -> tuple[str, str, int] | None:
    """What stands before the name, between name and arguments, and where these end."""
    name = text.find(_NAMES[which])
    if name < 0:
        return None
    after_name = name + len(_NAMES[which])
    for brace in re.finditer(r"\{", text[after_name:]):
        start = after_name + brace.start()
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue
        if value == _ARGUMENTS[which]:
            return text[:name], text[after_name:start], end
    return None


def _joint(one: str, two: str, first: tuple[str, str, int]) -> tuple[str, str, str] | None:
    """What ends a call, joins two of them and begins one; None if two calls look otherwise."""
    before, between, end = first
    start = _parts(two, 0)
    second = _parts(two[end:], 1) if start == first else None
    if second is None or second[1] != between:
        return None
    middle = second[0]
    after = _common(middle, one[end:])
    rest = middle[len(after) :]
    call = _common(rest[::-1], before[::-1])[::-1]
    return after, rest[: len(rest) - len(call)], call


def _proven(found: ToolFormat) -> ToolFormat | None:
    """None unless what it writes can be read again."""
    calls = list(zip(_NAMES, map(json.dumps, _ARGUMENTS), strict=True))
    calls = calls[: 1 if found.joint is None else 2]
    return found if read_calls(found, found.write(calls)) == calls else None


def read_calls(form: ToolFormat, text: str) -> list[tuple[str, str]]:
    """The calls in a text that is in the form; empty if it is not."""
    if not text.startswith(form.opening):
        return []
    at, calls = len(form.opening), []
    while text.startswith(form.before, at):
        start = at + len(form.before)
        name_end = text.find(form.between, start)
        if name_end < 0:
            break
        try:
            _, end = json.JSONDecoder().raw_decode(text, name_end + len(form.between))
        except ValueError:
            break
        calls.append((text[start:name_end], text[name_end + len(form.between) : end]))
        at = end + len(form.after)
        if form.joint is None or not text.startswith(form.joint + form.before, at):
            break
        at += len(form.joint)
    return calls


# --- grammars


def forced_calls(
    tokenizer: "PreTrainedTokenizerBase",
    form: ToolFormat,
    tools: Sequence[Tool],
    *,
    parallel: bool,
    thinking: bool,
    param: str,
    free: bool = False,
) -> str:
    """A grammar of one or more calls of these tools.

    thinking: the prompt ends inside the model's thoughts, which come first then. free: plain text
    is an answer as well, and may come before the calls. Raises InvalidRequest for the parameters of
    a tool that are too large to be followed, and UnsupportedParameter when free text could not be
    told from a call.
    """
    literal = functools.partial(_literal, tokenizer)
    more = ""
    if parallel and form.joint is not None:
        more = f"({literal(form.joint)} call){{0,{MAX_CALLS - 1}}}"
    rest = f"{more} {literal(form.closing)}"
    thought = THOUGHT if thinking else ""
    lines = [LARK.rstrip()]
    if free:
        lead, trigger = _trigger(form, param)
        lines.append(f"start: {thought} (TEXT | said first {rest})")
        lines.append("TEXT: /(.|\\n)*/")
        special = _literal(tokenizer, lead).startswith("<[")
        lines.append(
            f"said: TEXT {literal(lead)}" if special else f"said[lazy]: TEXT {literal(lead)}"
        )
        lines.append("first: " + " | ".join(f"first_{at}" for at in range(len(tools))))
    else:
        trigger = ""
        lines.append(f"start: {thought} {literal(form.opening)} call {rest}")
    lines.append("call: " + " | ".join(f"call_{at}" for at in range(len(tools))))
    for at, tool in enumerate(tools):
        function = tool["function"]
        name = function["name"] + form.between
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        check_schema(schema, param)
        strict = function.get("strict", False)
        options = {"whitespace_pattern": WHITESPACE, "lenient": not strict}
        arguments = json.dumps({**schema, "x-guidance": {**options, "coerce_one_of": not strict}})
        lines.append(f"arguments_{at}: %json {arguments}")
        end = f"arguments_{at} {literal(form.after)}"
        lines.append(f"call_{at}: {literal(form.before + name)} {end}")
        if free:
            lines.append(f"first_{at}: {literal(trigger + name)} {end}")
    return "\n".join(lines) + "\n" + (THOUGHT_RULES if thinking else "")


def _trigger(form: ToolFormat, param: str) -> tuple[str, str]:
    """What no plain text has in it, and the rest of what stands before a name."""
    head = form.opening + form.before
    start = len(head[: head.find("{")].rstrip())
    if start <= 0:
        raise UnsupportedParameter(
            "this model's calls begin like any other JSON, so strict tools need a tool_choice that"
            " demands a call",
            param=param,
            hint="leave strict out of the tools, or send tool_choice required",
        )
    return head[:start], head[start:]


def _literal(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """Text in a grammar; control tokens as their ids, since their letters would not do."""
    control = vocabulary(tokenizer).control
    pieces: list[str] = []
    at = 0
    for found in control.finditer(text) if control is not None else ():
        pieces += [json.dumps(text[at : found.start()])] if found.start() > at else []
        pieces.append(f"<[{tokenizer.convert_tokens_to_ids(found[0])}]>")
        at = found.end()
    pieces += [json.dumps(text[at:])] if at < len(text) else []
    return " ".join(pieces)
