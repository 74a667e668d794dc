"""Responses and their events, each looked at with the official client's own types."""

import json
import typing
from collections.abc import Sequence
from typing import Any

from openai.types.responses import Response
from openai.types.responses import response_stream_event

EVENTS: dict[str, Any] = {
    typing.get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in typing.get_args(typing.get_args(response_stream_event.ResponseStreamEvent)[0])
}


def checked(response: dict[str, Any]) -> dict[str, Any]:
    """The same, after the client's type has found every field in order."""
    Response.model_validate(response)
    return response


def streamed(text: str) -> list[dict[str, Any]]:
    """The events of a stream, after looking at names, numbers, order and types."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    found = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENTS[event["type"]].model_validate(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    check_order(found)
    return found


def check_order(events: Sequence[dict[str, Any]]) -> None:
    """Items begin and end one after the other, parts inside them, deltas add up to the whole."""
    names = [event["type"].removeprefix("response.") for event in events]
    assert names[:2] == ["created", "in_progress"]
    assert names[-1] in ("completed", "incomplete", "failed")
    assert len({e["response"]["id"] for e in events if "response" in e}) == 1
    opened: str | None = None
    grown = ""
    ended = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert opened is None
            assert event["output_index"] == len(ended)
            opened, grown = event["item"]["id"], ""
            assert event["item"]["status"] == "in_progress"
        elif kind == "output_item.done":
            assert event["item"]["id"] == opened
            ended.append(event["item"])
            opened = None
        elif "item_id" in event:
            assert event["item_id"] == opened
            assert event["output_index"] == len(ended)
            grown += event.get("delta", "")
        if kind.endswith(("text.done", "arguments.done")):
            assert grown == event.get("text", event.get("arguments"))
    if names[-1] != "failed":
        assert opened is None
        assert events[-1]["response"]["output"] == ended
