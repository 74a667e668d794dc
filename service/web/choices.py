"""Answers as `choices`: the JSON of chats and completions, whole and in chunks."""

import time
import uuid
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from typing import Protocol

from service.text.stream import Step
from service.web import generation
from service.web import sse
from service.web.generation import Part
from service.web.generation import Work


class Shape(Protocol):
    """How a choice is written: the difference between the two endpoints.

    One for each request. It is told of every part of every choice in order. reasoning_tokens: of
    all choices so far, None if the model has no thoughts.
    """

    prefix: str
    object: str
    chunk_object: str

    @property
    def reasoning_tokens(self) -> int | None: ...

    def choice(self, index: int, answer: Part) -> dict[str, Any]:
        """A whole answer."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream starts with, before there is text."""

    def delta(self, index: int, part: Part) -> dict[str, Any]:
        """A part of an answer, or its end."""


class Choices:
    """Writes what `service.web.generation.Writer` says."""

    ending = sse.DONE

    def __init__(self, work: Work, shape: Shape) -> None:
        self._work = work
        self._shape = shape
        self._counts = [0 for _ in work.streams]

    def whole(self) -> dict[str, Any]:
        came: list[list[Part]] = [[] for _ in self._work.streams]
        for index, part in generation.parts(self._work):
            came[index].append(part)
            self._counts[index] = part.completion_tokens
        choices = [self._shape.choice(index, _joined(parts)) for index, parts in enumerate(came)]
        return {**self._head(self._shape.object), "choices": choices, "usage": self._usage()}

    def events(self) -> Iterator[Mapping[str, Any] | None]:
        shape = self._shape
        head = self._head(shape.chunk_object)
        options = self._work.job.request.stream_options

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            event = {**head, "choices": [choice]}
            if options.continuous_usage_stats:
                event["usage"] = self._usage()
            elif options.include_usage:
                event["usage"] = None
            return event

        for index in range(len(self._work.streams)):
            opening = shape.opening(index)
            if opening is not None:
                yield chunk(opening)
        for index, part in generation.parts(self._work):
            self._counts[index] = part.completion_tokens
            if part.finish_reason is None:
                yield chunk(shape.delta(index, part)) if part.text else None
                continue
            if part.text:
                yield chunk(shape.delta(index, replace(part, finish_reason=None)))
                part = replace(part, text="", tokens=(), steps=())
            yield chunk(shape.delta(index, part))
        if options.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def failed(self, error: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"error": error}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self._shape.prefix}{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self._work.serving.model_id,
        }

    def _usage(self) -> dict[str, Any]:
        """Tokens of the request so far."""
        prompt, cached = generation.prompt_tokens(self._work)
        completion = sum(self._counts)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        thoughts = self._shape.reasoning_tokens
        if thoughts is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": thoughts}
        return usage


def _joined(parts: Sequence[Part]) -> Part:
    """All parts of an answer as one."""
    steps: list[Step] = [step for part in parts for step in part.steps]
    return Part(
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.tokens),
        parts[-1].finish_reason,
        parts[-1].completion_tokens,
        tuple(steps),
    )
