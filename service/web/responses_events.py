"""An answer as items, and the events that tell of them: the JSON of /v1/responses."""

import time
import uuid
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from service.text.answer import CallDelta
from service.text.answer import Delta
from service.text.token_texts import token_texts
from service.web import forms
from service.web import generation
from service.web import logprobs
from service.web.generation import Part
from service.web.generation import Work

if TYPE_CHECKING:
    from service.engine.choosing import Chosen
    from service.web.responses_schema import ResponseRequest

Event = dict[str, Any]
Item = dict[str, Any]
# the codes that OpenAI specifies, by the types of our errors
CODES = {"rate_limit_error": "rate_limit_exceeded", "invalid_request_error": "invalid_prompt"}

_OF_ITEMS: Mapping[str, dict[str, Any]] = {
    "message": {"role": "assistant"},
    "reasoning": {"summary": []},
}


class Output:
    """The items of one answer. Its methods give the events of what they add.

    At most one item is open: it grows until another begins. items: as they are told at last.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._open: Item | None = None
        self._said: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def add(self, delta: Delta, told: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        """More of the answer. told: logprobs of the tokens of this text."""
        if delta.call is not None:
            yield from self._call(delta.call)
        if delta.reasoning:
            yield from self._more("reasoning", delta.reasoning, told)
        if delta.content:
            yield from self._more("message", delta.content, told)

    def end(self, told: Sequence[dict[str, Any]], *, cut_off: bool) -> Iterator[Event]:
        """The answer is complete, or was cut off. It has an item at least."""
        if self._open is None and not self.items:
            yield from self._begin("message")
        self._logprobs += told
        yield from self._close("incomplete" if cut_off else "completed")

    def so_far(self) -> list[Item]:
        """All items, an open one as it is."""
        return self.items if self._open is None else [*self.items, self._written("incomplete")]

    def _more(self, kind: str, text: str, told: Sequence[dict[str, Any]]) -> Iterator[Event]:
        if self._open is None or self._open["type"] != kind:
            yield from self._begin(kind)
        self._said.append(text)
        if kind == "reasoning":
            yield self._event("response.reasoning_text.delta", content_index=0, delta=text)
            return
        self._logprobs += told
        yield self._event(
            "response.output_text.delta", content_index=0, delta=text, logprobs=list(told)
        )

    def _call(self, call: CallDelta) -> Iterator[Event]:
        if call.name is not None:
            named = {"call_id": call.id, "name": call.name}
            yield from self._begin("function_call", named)
        if call.arguments:
            self._said.append(call.arguments)
            yield self._event("response.function_call_arguments.delta", delta=call.arguments)

    def _begin(self, kind: str, named: Mapping[str, Any] | None = None) -> Iterator[Event]:
        yield from self._close("completed")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        self._open = {"type": kind, "id": f"{prefix}_{uuid.uuid4().hex}", **(named or {})}
        self._said, self._logprobs = [], []
        begun: dict[str, Any] = {**self._open, "status": "in_progress"}
        if kind == "function_call":
            begun["arguments"] = ""
        else:
            begun["content"] = []
            begun |= _OF_ITEMS[kind]
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.items),
            "item": begun,
        }
        if kind != "function_call":
            yield self._event("response.content_part.added", content_index=0, part=self._part())

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is None:
            return
        text = "".join(self._said)
        item = self._written(status)
        if item["type"] == "function_call":
            yield self._event(
                "response.function_call_arguments.done", name=item["name"], arguments=text
            )
        elif item["type"] == "reasoning":
            yield self._event("response.reasoning_text.done", content_index=0, text=text)
        else:
            yield self._event(
                "response.output_text.done", content_index=0, text=text, logprobs=self._logprobs
            )
        if item["type"] != "function_call":
            part = item["content"][0]
            yield self._event("response.content_part.done", content_index=0, part=part)
        yield {
            "type": "response.output_item.done",
            "output_index": len(self.items),
            "item": item,
        }
        self.items.append(item)
        self._open = None

    def _written(self, status: str) -> Item:
        """The open item with all that it has."""
        item: Item = {**(self._open or {}), "status": status}
        if item["type"] == "function_call":
            return {**item, "arguments": "".join(self._said)}
        return {**item, **_OF_ITEMS[item["type"]], "content": [self._part()]}

    def _part(self) -> dict[str, Any]:
        text = "".join(self._said)
        if self._open is not None and self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": self._logprobs,
        }

    def _event(self, kind: str, **more: Any) -> Event:
        """Of the open item."""
        id_ = self._open["id"] if self._open is not None else None
        return {"type": kind, "output_index": len(self.items), "item_id": id_, **more}


class Responses:
    """Writes what `service.web.generation.Writer` says: one answer, by the events it would have."""

    ending = b""

    def __init__(self, work: Work, request: "ResponseRequest") -> None:
        self._work = work
        self._request = request
        self._texts = token_texts(work.serving.tokenizer)
        reading = work.job.reading
        self._reader = None if reading is None else reading.reader()
        self._output = Output()
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created_at = int(time.time())
        self._number = 0

    def whole(self) -> dict[str, Any]:
        last: Mapping[str, Any] = {}
        for event in self.events():
            last = last if event is None else event
        found: dict[str, Any] = last["response"]
        return found

    def events(self) -> Iterator[Mapping[str, Any] | None]:
        yield self._numbered(self._told("response.created", "in_progress"))
        yield self._numbered(self._told("response.in_progress", "in_progress"))
        for _, part in generation.parts(self._work):
            silent = True
            for event in self._of(part):
                silent = False
                yield self._numbered(event)
            if part.finish_reason is not None:
                yield self._numbered(self._end(part))
            elif silent:
                yield None

    def failed(self, error: Mapping[str, Any]) -> Mapping[str, Any]:
        event = self._told("response.failed", "failed")
        event["response"] |= {
            "error": {
                "code": CODES.get(error["type"], "server_error"),
                "message": error["message"],
                "type": error["type"],
                "param": error["param"],
            },
            "output": self._output.so_far(),
        }
        return self._numbered(event)

    def _of(self, part: Part) -> Iterator[Event]:
        told = self._logprobs(part.tokens)
        if self._reader is not None:
            # Their logprobs are refused: a token may be of thoughts, calls and text at once.
            deltas = forms.read(self._reader, part.steps)
            if part.finish_reason is not None:
                deltas += self._reader.finish()
            for delta in deltas:
                yield from self._output.add(delta)
        elif part.text:
            yield from self._output.add(Delta(content=part.text), told)
            told = []
        if part.finish_reason is not None:
            yield from self._output.end(told, cut_off=part.finish_reason == "length")

    def _end(self, part: Part) -> Event:
        cut_off = part.finish_reason == "length"
        status = "incomplete" if cut_off else "completed"
        event = self._told(f"response.{status}", status)
        event["response"] |= {
            "output": self._output.items,
            "usage": self._usage(part.completion_tokens),
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
        }
        if not cut_off:
            event["response"]["completed_at"] = int(time.time())
        return event

    def _told(self, name: str, status: str) -> Event:
        """An event about the response, as it is without its output."""
        request, defaults = self._request, self._work.serving.defaults
        response = {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self._work.serving.model_id,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": generation.first_of(
                request.temperature, defaults.get("temperature"), 1.0
            ),
            "top_logprobs": request.top_logprobs,
            "top_p": generation.first_of(request.top_p, defaults.get("top_p"), 1.0),
            "truncation": "disabled",
            "usage": None,
            "user": None,
            **request.repeated,
        }
        return {"type": name, "response": response}

    def _numbered(self, event: Event) -> Event:
        event["sequence_number"] = self._number
        self._number += 1
        return event

    def _usage(self, output_tokens: int) -> dict[str, Any]:
        prompt, cached = generation.prompt_tokens(self._work)
        thoughts = 0 if self._reader is None else self._reader.thought_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": thoughts},
            "total_tokens": prompt + output_tokens,
        }

    def _logprobs(self, tokens: Sequence["Chosen"]) -> list[dict[str, Any]]:
        """As a chat tells them. `bytes` is never null here."""
        found: list[dict[str, Any]] = logprobs.of_chat(self._texts, tokens)["content"]
        for entry in [each for token in found for each in (token, *token["top_logprobs"])]:
            if entry["bytes"] is None:
                entry["bytes"] = list(entry["token"].encode())
        return found
