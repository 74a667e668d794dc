"""The server that everybody writes first: Flask, `generate`, a lock. A peer, not an example.

python -m benchmarks.naive FOLDER PORT
"""

import json
import sys
import threading
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

from flask import Flask
from flask import Response
from flask import request


def create_app(model: Any, tokenizer: Any) -> Flask:
    """POST /v1/completions, streamed, one at a time; GET /health."""
    from transformers import TextIteratorStreamer

    app = Flask("naive")
    lock = threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    def completions() -> Response:
        asked = request.get_json()
        inputs = tokenizer(asked["prompt"], return_tensors="pt")
        tokens = asked["max_tokens"]
        end = {"min_new_tokens": tokens} if asked.get("ignore_eos") else {}

        def stream() -> Iterator[str]:
            with lock:
                streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
                made: list[Any] = []

                def generate() -> None:
                    options = {"do_sample": False, "max_new_tokens": tokens, **end}
                    made.append(model.generate(**inputs, streamer=streamer, **options))

                thread = threading.Thread(target=generate)
                thread.start()
                for text in streamer:
                    yield _event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})
                thread.join()
            prompt = inputs["input_ids"].shape[1]
            usage = {"prompt_tokens": prompt, "completion_tokens": made[0].shape[1] - prompt}
            yield _event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"

        return Response(stream(), mimetype="text/event-stream")

    return app


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


def main(arguments: Sequence[str]) -> int:
    """Serve on loopback with Flask's own server until ended."""
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    folder, port = arguments
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    app = create_app(model, AutoTokenizer.from_pretrained(folder))
    app.run("127.0.0.1", int(port), threaded=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
