"""What the operator reads when the model may be used."""

import json
import shlex
from typing import Any
from urllib.parse import urlsplit

from service.config.schema import Config


def ready_line(
    config: Config, model_id: str, address: str | None = None, *, embeds: bool = False
) -> str:
    """What the operator reads when the model may be used, with a curl to paste.

    `address` is what the server really listens on, as gunicorn prints it ("http://127.0.0.1:8000",
    "unix:/run/moorage.sock"); default: `server.bind`. embeds: the model gives embeddings.
    """
    where = reachable(address or config.server.bind)
    url, options = where, ""
    if where.startswith("unix:"):
        path = where.removeprefix("unix:")
        url, options = "http://localhost", f"--unix-socket {shlex.quote(path)} "
    endpoint, asked = "/v1/embeddings", dict[str, Any](input="The sea is calm tonight.")
    if not embeds:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        endpoint, asked = "/v1/chat/completions", {"messages": question, "temperature": 0}
    body = json.dumps({"model": model_id, **asked})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_keys else ""
    shown = url if not options else (address or config.server.bind)
    return (
        f"Moorage is ready: {shown}  try: curl {options}{url}{endpoint}{key}"
        f" -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def reachable(address: str) -> str:
    """The URL for a client on this machine, or unix:PATH. address: as `server.bind` has it, or as
    gunicorn prints it.
    """
    if address.startswith("unix:"):
        return f"unix:{address.removeprefix('unix:').removeprefix('//')}"
    parts = urlsplit(address if "://" in address else f"http://{address}")
    host = parts.hostname or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"{parts.scheme}://{host}:{parts.port or 8000}"
