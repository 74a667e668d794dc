"""The text of an answer taken apart as it comes: thoughts, tool calls, and what is said.

transformers' ResponseParser finds the parts, by the template that the tokenizer brings or by one
made from what its chat template shows.
"""

import json
import logging
import re
import uuid
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Any

from service.text.chat import vocabulary
from service.text.constraints import END_OF_THOUGHT
from service.text.tools import Tool
from service.text.tools import ToolFormat
from service.text.tools import tool_use

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)

START_OF_THOUGHT = "<think>"
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# The head of a call is looked for in so many characters; then it is shown when it is complete.
HEAD_CHARACTERS = 1024


@dataclass(frozen=True)
class CallDelta:
    """A part of a tool call: its start has id and name, the others more of the arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Delta:
    """What came: one of text, thoughts and a part of a call."""

    content: str = ""
    reasoning: str = ""
    call: CallDelta | None = None


@dataclass(frozen=True)
class Reading:
    """How answers of one request are read.

    template: for ResponseParser. prefix: the start of the answer, if the prompt has written it.
    calls: whether the answer may call tools. name, arguments: keys that lead to them in the JSON of
    a call. marker, close: around that JSON.
    """

    template: Mapping[str, Any]
    prefix: str
    calls: bool
    tools: tuple[Tool, ...] = ()
    name: tuple[str, ...] = ("function", "name")
    arguments: tuple[str, ...] = ("function", "arguments")
    streamed: tuple[str, str] | None = ("name", "(?:arguments|parameters)")
    marker: str = ""
    close: str = ""
    control: re.Pattern[str] | None = None

    @property
    def thinks(self) -> bool:
        """Whether an answer may have thoughts."""
        return any(name in THOUGHTS for name in self.template["fields"])

    def reader(self) -> "AnswerReader":
        """For one answer."""
        return AnswerReader(self)


def reading(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, tools: Sequence[Tool] = ()
) -> Reading | None:
    """How to read answers to a prompt; None if they are plain text.

    prompt: as rendered. tools: those that the answer may call; without any, what looks like a call
    is text.
    """
    control = vocabulary(tokenizer).control
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        fields = own["fields"]
        kept = {n: f for n, f in fields.items() if tools or n != "tool_calls"}
        template = {**own, "fields": kept}
        return Reading(template, prompt, bool(tools), tuple(tools), control=control)
    found: dict[str, Any] = {}
    if END_OF_THOUGHT in str(tokenizer.chat_template):
        found["reasoning_content"] = {"open": START_OF_THOUGHT, "close": END_OF_THOUGHT}
    form = tool_use(tokenizer).format if tools else None
    told: dict[str, Any] = {}
    if form is not None:
        found["tool_calls"], told = _region(form)
    if not found:
        return None
    found["content"] = {"content": "text"}
    # No anchor is looked for: the prefix is only what the prompt wrote of the answer.
    template = {"start_anchor": "\x00", "fields": found}
    prefix = START_OF_THOUGHT if thinking(prompt) else ""
    return Reading(template, prefix, bool(form), tuple(tools), control=control, **told)


def thinking(prompt: str) -> bool:
    """Whether a prompt ends inside the model's thoughts."""
    return prompt.rstrip().endswith(START_OF_THOUGHT)


def _region(form: ToolFormat) -> tuple[dict[str, Any], dict[str, Any]]:
    """The field of a template for calls in a form, and what `Reading` is told of it.

    A region is one call, or a list of them. What is not JSON comes out as text.
    """
    head = form.opening + form.before
    start = head.rindex("{") if "{" in head else len(head)
    listed = form.closing.lstrip().startswith("]") and head[:start].rstrip().endswith("[")
    if listed:
        start = head.rindex("[", 0, start)
    sample = form.write([("name", '{"key": "value"}')])
    value, end = json.JSONDecoder().raw_decode(sample, start)
    call = value[0] if listed else value
    marker, close = sample[:start].strip(), sample[end:].strip()
    name, arguments = tuple(_path(call, "name")), tuple(_path(call, {"key": "value"}))
    region: dict[str, Any] = {
        "open_pattern": r"\s*" + re.escape(marker) if marker else r"\A\s*(?=\{\s*\")",
        "content": "json",
        "content_args": {"allow_non_json": True},
        "repeats": True,
    }
    if close:
        region["close"] = close
    plain = not listed and len(name) == len(arguments) == 1
    return region, {
        "name": name,
        "arguments": arguments,
        "streamed": (re.escape(name[0]), re.escape(arguments[0])) if plain else None,
        "marker": marker,
        "close": close,
    }


def _path(item: Any, wanted: Any) -> Iterator[str]:
    """Keys that lead to a value inside nested objects."""
    for key, value in item.items():
        if value == wanted:
            yield key
            return
        if isinstance(value, dict) and (inner := list(_path(value, wanted))):
            yield key
            yield from inner
            return


class AnswerReader:
    """Text of one answer in, deltas out. What they say, joined, is all of the answer.

    calls: begun so far. thought_tokens: tokens of the thoughts so far, with those around them.
    """

    def __init__(self, reading: Reading) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self._reading = reading
        self._parser: Any = ResponseParser(
            dict(reading.template), prefix=reading.prefix, tools=[dict(t) for t in reading.tools]
        )
        self._call = _Call(reading)
        self._recent = ""  # all text since a call began
        self._space = ""
        self._fresh = True  # nothing but white space has been said since the last other part
        self._thought_space: str | None = None  # None until one has begun
        self._thinking = False
        for event in self._parser.initial_events:
            self._notice(event)
        self.calls = 0
        self.thought_tokens = 0

    def feed(self, text: str, tokens: int = 0) -> list[Delta]:
        """What has become certain with this text, of so many tokens."""
        before = self._thinking
        deltas = self._feed(text)
        if before or self._thinking:
            self.thought_tokens += tokens
        return deltas

    def _feed(self, text: str) -> list[Delta]:
        if self._parser is None:
            return list(self._said(text))
        self._recent = self._recent + text if self._call.open else text
        try:
            events = self._parser.feed(text)
        except (ValueError, KeyError, TypeError) as error:  # a call that is not what it should be
            return list(self._broken(error))
        return [delta for event in events for delta in self._event(event)]

    def finish(self) -> list[Delta]:
        """The rest; the answer has ended."""
        deltas: list[Delta] = []
        if self._parser is not None:
            try:
                _, events = self._parser.finalize()
            except (ValueError, KeyError, TypeError) as error:
                deltas += self._broken(error)
            else:
                deltas += [delta for event in events for delta in self._event(event)]
        if self._space and not self.calls and not self._fresh:
            deltas.append(Delta(content=self._space))
        return deltas

    def _broken(self, error: Exception) -> Iterator[Delta]:
        """The tokenizer's own template could not read a call: from here on all is text."""
        LOG.info("a call could not be read: %s", type(error).__name__)
        self._parser = None
        self._thinking = False
        if not self._call.begun:
            at = self._recent.find(self._call.raw) if self._call.open else 0
            yield from self._said(self._recent[max(0, at) :])

    def _event(self, event: Mapping[str, Any]) -> Iterator[Delta]:
        name, kind = event["field"], event["type"]
        self._notice(event)
        if name == "tool_calls":
            self._fresh = True
            yield from self._of_call(kind, event)
        elif kind == "region_chunk" and name in THOUGHTS:
            self._fresh = True
            yield from self._thought(event["text"])
        elif kind == "region_chunk":
            yield from self._said(event["text"])

    def _notice(self, event: Mapping[str, Any]) -> None:
        """Where the parser is."""
        if event["type"] != "region_chunk":
            self._thinking = event["type"] == "region_open" and event["field"] in THOUGHTS
            self._thought_space = None

    def _thought(self, text: str) -> Iterator[Delta]:
        """Thoughts, without the white space at their ends, which is the template's."""
        text = (self._thought_space or "") + self._shown(text)
        if self._thought_space is None:
            text = text.lstrip()
        kept = text.rstrip()
        if kept:
            self._thought_space = text[len(kept) :]
            yield Delta(reasoning=kept)
        elif self._thought_space is not None:
            self._thought_space = text

    def _of_call(self, kind: str, event: Mapping[str, Any]) -> Iterator[Delta]:
        if kind == "region_open":
            self._call = _Call(self._reading, open=True)
        elif kind == "region_chunk":
            for call in self._call.feed(event["text"], self.calls):
                yield Delta(call=call)
        else:
            self._call.open = False
            if self._call.begun:
                self.calls += 1
                return
            value = event["value"]
            found = [self._whole(item) for item in (value if isinstance(value, list) else [value])]
            if not found or None in found:
                yield from self._said(self._reading.marker + self._call.raw + self._reading.close)
                return
            for each in found:
                name, arguments = each or ("", "")
                yield Delta(call=CallDelta(self.calls, arguments, call_id(), name))
                self.calls += 1

    def _whole(self, value: Any) -> tuple[str, str] | None:
        """Name and arguments of a call that came at once."""
        name, arguments = value, value
        try:
            for key in self._reading.name:
                name = name[key]
            for key in self._reading.arguments:
                arguments = arguments[key]
        except (KeyError, TypeError, IndexError):
            return None
        if not isinstance(name, str):
            return None
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return name, arguments

    def _said(self, text: str) -> Iterator[Delta]:
        """Text; white space at its ends is kept back, since it may only part it from a call."""
        text = self._space + self._shown(text)
        if self._fresh:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._fresh = False
            yield Delta(content=kept)

    def _shown(self, text: str) -> str:
        """Without control tokens, which are only there for the parser to see."""
        control = self._reading.control
        return text if control is None else control.sub("", text)


def call_id() -> str:
    """As OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass
class _Call:
    """One call being written: its JSON so far, and whether its name has been told."""

    reading: Reading
    open: bool = False
    raw: str = ""
    begun: bool = False
    _object: "_Object" = field(default_factory=lambda: _Object())

    def feed(self, text: str, index: int) -> Iterator[CallDelta]:
        """The start of the call once its name is complete, then its arguments as they come."""
        self.raw += text
        if not self.begun:
            found = self._head()
            if found is None:
                return
            self.begun = True
            text = self.raw[found.end() :]
            yield CallDelta(index, "", call_id(), json.loads(found[1], strict=False))
        if arguments := self._object.feed(text):
            yield CallDelta(index, arguments)

    def _head(self) -> re.Match[str] | None:
        if self.reading.streamed is None or len(self.raw) > HEAD_CHARACTERS:
            return None
        name, arguments = self.reading.streamed
        string = r'("(?:[^"\\]|\\["\\/bfnrt])*")'
        pattern = rf'\s*\{{\s*"{name}"\s*:\s*{string}\s*,\s*"{arguments}"\s*:\s*(?=\{{)'
        return re.match(pattern, self.raw)


@dataclass
class _Object:
    """Passes on the text of one JSON object and nothing behind it."""

    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False
    _ended: bool = False

    def feed(self, text: str) -> str:
        if self._ended:
            return ""
        for at, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._ended = True
                    return text[: at + 1]
        return text
