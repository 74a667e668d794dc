"""Requests as tests of this room send them, and answers as they read them."""

import json
from typing import Any

from tests.support.fake_deployment import MODEL_ID

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hi"}], **fields}


def completion_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL_ID, "prompt": "Hi", **fields}


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    return chat_body(**fields) if path == CHAT else completion_body(**fields)


def events(text: str) -> list[Any]:
    """Events of a stream: JSON, and "[DONE]" as it is. Comments are left out."""
    found: list[Any] = []
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            assert block.startswith("data: "), block
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error object, after checking its shape."""
    assert response.status_code == status, response.get_data(as_text=True)
    assert response.content_type == "application/json"
    error = response.get_json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert isinstance(error["message"], str)
    assert error["message"]
    return error
