"""`moorage chat`: a conversation in the terminal, or one question through a pipe."""

import contextlib
import json
import sys
from collections.abc import Generator
from collections.abc import Mapping
from typing import Annotated
from typing import Any

import typer

from service.cli import options
from service.cli import report
from service.cli.asking import Server
from service.errors import NoAnswer

SET_BY_CHAT = ("model", "messages", "stream", "stream_options", "n")


@report.guard
def chat(
    url: options.Url = None,
    model: options.ServedModel = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system message.")
    ] = None,
    config: options.Config = None,
    deployment: options.Deployment = None,
    as_json: options.AsJson = False,
) -> None:
    """Talk to a model that is served. `/help` says what else can be written.

    In a pipe, stdin is one question, and its answer is all that stdout gets.
    """
    server = options.server(url, config, deployment)
    if sys.stdin.isatty() and sys.stdout.isatty() and not as_json:
        from service.cli import chat_session

        talk = Talk(server, model or server.first_model(), system)
        chat_session.run(talk, options.cache() / "chat_history")
        return
    question = sys.stdin.buffer.read().decode(errors="replace").strip()
    if not question:
        raise typer.BadParameter("there is no question on stdin")
    talk = Talk(server, model or server.first_model(), system)
    if as_json:
        report.print_json(_document(talk, question))
        return
    last = "\n"
    for kind, text in talk.ask(question):
        if kind == "answer":
            sys.stdout.buffer.write(text.encode(errors="replace"))
            sys.stdout.flush()
            last = text
    if not last.endswith("\n"):
        typer.echo()


def _document(talk: "Talk", question: str) -> dict[str, Any]:
    pieces = list(talk.ask(question))
    return {
        "object": "chat",
        "schema": 1,
        "model": talk.model,
        "answer": "".join(text for kind, text in pieces if kind == "answer"),
        "thoughts": "".join(text for kind, text in pieces if kind == "thought") or None,
        "finish_reason": talk.finish_reason,
        "usage": talk.usage,
    }


class Talk:
    """A conversation so far, and the settings of the next request.

    finish_reason, usage: of the last answer.
    """

    def __init__(self, server: Server, model: str, system: str | None) -> None:
        self.server, self.model, self.system = server, model, system
        self.messages: list[dict[str, str]] = []
        self.settings: dict[str, Any] = {}
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None

    def body(self) -> dict[str, Any]:
        """The next request, as `/save` writes it."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return {"model": self.model, "messages": [*first, *self.messages], **self.settings}

    def ask(self, question: str) -> Generator[tuple[str, str]]:
        """Pieces of the answer as they come: ("answer", text) or ("thought", text).

        Question and answer are remembered when it is over, also an answer that the caller has
        stopped, by closing this; not when it fails. Raises NoAnswer.
        """
        self.messages.append({"role": "user", "content": question})
        self.finish_reason, self.usage = None, None
        answer = ""
        body = {**self.body(), "stream_options": {"include_usage": True}}
        events = self.server.stream("/chat/completions", body)
        try:
            with contextlib.closing(events):
                for event in events:
                    self.usage = event.get("usage") or self.usage
                    for choice in event.get("choices") or ():
                        self.finish_reason = choice.get("finish_reason") or self.finish_reason
                        for kind, text in _pieces(choice.get("delta") or {}):
                            answer += text if kind == "answer" else ""
                            yield kind, text
        except NoAnswer:
            self.messages.pop()
            raise
        except (GeneratorExit, KeyboardInterrupt):
            self._remember(answer)
            raise
        self._remember(answer)

    def _remember(self, answer: str) -> None:
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:  # two questions in a row would be refused by many templates
            self.messages.pop()

    def set(self, key: str, text: str) -> None:
        """A field of the request; text: JSON, or a word. Raises ValueError for a field that is not
        to be set.
        """
        if key in SET_BY_CHAT:
            raise ValueError(f"{key} is not to be set; /help says how it is changed, if it can be")
        try:
            self.settings[key] = json.loads(text)
        except ValueError:
            self.settings[key] = text


def _pieces(delta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Text of one event. Thoughts have two names among servers."""
    thought = delta.get("reasoning_content") or delta.get("reasoning")
    found = (("thought", thought), *(("answer", delta.get(key)) for key in ("refusal", "content")))
    return [(kind, text) for kind, text in found if isinstance(text, str) and text]
