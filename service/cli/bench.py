"""`moorage bench`: how fast a server answers several clients at once."""

import datetime
import importlib.util
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated
from typing import Any

import typer

from service.cli import asking
from service.cli import bench_text
from service.cli import options
from service.cli import report
from service.cli import terminal
from service.cli import timing
from service.cli.timing import Answer
from service.errors import NoAnswer
from service.errors import PlacementUnavailable

# fields of vLLM's and ours that keep an answer from ending early; others refuse or ignore them
TO_THE_END = {"ignore_eos": True}
MOST_CLIENTS = 1024
WORDS = (
    "anchor basin beacon berth bridge buoy cabin canal cargo chart coast crane crew current deck "
    "dock ferry fleet fog gale gate grain harbour hatch haven hull island jetty journey keel "
    "lamp lantern launch letter light line mast morning night ocean oar paper pier pilot port "
    "quay rain raft reef river rope rudder sail sand shelf ship shore signal sky sound star "
    "stone storm stream strait summer tide timber tower trade vessel voyage water wave weather "
    "west wharf wind winter yard"
)


@dataclass
class Level:
    """What is measured with one number of clients: `answers` has what has ended."""

    clients: int
    requests: int
    answers: list[Answer] = field(default_factory=list)

    @property
    def good(self) -> list[Answer]:
        """Answers with text, to their end."""
        return [a for a in self.answers if a.error is None and a.times]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """What the others say, those that say alike together: how many, and one of them."""
        said = [a.error or "the answer was empty" for a in self.answers if a.error or not a.times]
        kinds = Counter(text.partition(": ")[0] for text in said)
        return [
            {"count": count, "message": next(text for text in said if text.startswith(kind))}
            for kind, count in kinds.items()
        ]

    def row(self) -> dict[str, Any]:
        """For JSON: see `timing.figures`; null where nothing was answered."""
        good, errors = self.good, self.errors
        figures = timing.figures(good) if good else {}
        return {
            "clients": self.clients,
            "requests": self.requests,
            "answered": len(good),
            "failed": sum(error["count"] for error in errors),
            **{key: figures.get(key) for key in bench_text.FIGURES},
            "errors": errors,
        }


@report.guard
def bench(
    url: options.Url = None,
    clients: Annotated[
        str, typer.Option("--clients", metavar="N,...", help="Numbers of clients, one by one.")
    ] = "1,8,32",
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            min=1,
            metavar="N",
            help="Requests with each number of clients. Default: two for each client, 8 or more.",
        ),
    ] = None,
    prompt: Annotated[
        int, typer.Option("--prompt", min=1, metavar="TOKENS", help="Length of a prompt, about.")
    ] = 128,
    output: Annotated[
        int, typer.Option("--output", min=1, metavar="TOKENS", help="Length of an answer.")
    ] = 64,
    model: options.ServedModel = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Also draw it; needs matplotlib."),
    ] = None,
    config: options.Config = None,
    deployment: options.Deployment = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure a server that speaks OpenAI's API: streamed chats of random words, several at once.

    Ctrl-C ends it with what was measured so far. Exit status 1 if nothing was answered.
    """
    counts = _counts(clients)
    if plot is not None:
        _check_plot(plot)
    server = options.server(url, config, deployment)
    asked = Asked(server, model or server.first_model(), prompt, output)
    asked.settle()
    levels, interrupted = measure(asked, counts, requests)
    document = as_document(asked, levels, interrupted=interrupted)
    if as_json:
        report.print_json(document)
    else:
        bench_text.show(document)
    if plot is not None and any(level.good for level in levels):
        bench_text.draw(document, plot)
    if not any(level.good for level in levels):
        raise NoAnswer("nothing was answered")


def _check_plot(path: Path) -> None:
    """Before anything is measured. Raises BadParameter, PlacementUnavailable."""
    if path.suffix != ".png" or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        told = f"{path}: name a file that ends with .png, in a folder that can be written"
        raise typer.BadParameter(told, param_hint="--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise PlacementUnavailable(
            "--plot needs matplotlib, which is not installed", hint="pip install 'moorage[bench]'"
        )


class Asked:
    """The requests that are sent. `one` may be called from any thread."""

    def __init__(self, server: asking.Server, model: str, prompt: int, output: int) -> None:
        """prompt, output: tokens."""
        self.server, self.model, self.prompt, self.output = server, model, prompt, output
        self.to_the_end: Mapping[str, Any] = TO_THE_END
        self.words = prompt
        self.counted = True
        # the same prompts again would be found in the server's prefix cache
        self._draw = random.Random()  # noqa: S311 - no secrets

    def settle(self) -> None:
        """Find out what the server takes and how many tokens a word is, with two short requests,
        and warm it up with one like those that are measured. Raises NoAnswer.
        """
        words = WORDS.split()
        try:
            one = self._try(words[:1], 1)
        except NoAnswer as error:
            if error.answered not in (400, 422):
                raise
            self.to_the_end = {}  # it may not know that field
            one = self._try(words[:1], 1)
        every = self._try(words, 1)
        if 0 < one.prompt_tokens < every.prompt_tokens:
            a_word = (every.prompt_tokens - one.prompt_tokens) / (len(words) - 1)
            beside = one.prompt_tokens - a_word  # the template
            self.words = max(1, round((self.prompt - beside) / a_word))
        self._try(self.text().split(), self.output)

    def text(self) -> str:
        """A prompt of the length that is asked for; another one each time."""
        return " ".join(self._draw.choices(WORDS.split(), k=self.words))

    def _try(self, words: Sequence[str], tokens: int) -> Answer:
        answer = Answer(0.0)
        self.send(" ".join(words), answer, tokens)
        return answer

    def one(self, text: str, answer: Answer) -> None:
        """One of those that are measured; its error is noted in the answer."""
        try:
            self.send(text, answer, self.output)
        except NoAnswer as error:
            answer.error = error.message

    def send(self, text: str, answer: Answer, tokens: int) -> None:
        """A chat. The first arrival is the first that has text. Raises NoAnswer."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream_options": {"include_usage": True},
            **self.to_the_end,
        }
        usage: Mapping[str, Any] = {}
        for event in self.server.stream("/chat/completions", body):
            now = time.perf_counter()
            if any(_has_text(choice) for choice in event.get("choices") or ()):
                answer.times.append(now)
            usage = event.get("usage") or usage
        self.counted = self.counted and "completion_tokens" in usage
        answer.tokens = usage.get("completion_tokens", len(answer.times))
        answer.prompt_tokens = usage.get("prompt_tokens", 0)


def measure(asked: Asked, counts: Sequence[int], requests: int | None) -> tuple[list[Level], bool]:
    """A level for each number of clients, and whether Ctrl-C ended it: the last is in part then."""
    levels = [Level(count, requests or max(8, 2 * count)) for count in counts]
    of = sum(level.requests for level in levels)
    stopped = threading.Event()
    with terminal.progress() as tell:
        for number, level in enumerate(levels):
            before = sum(level.requests for level in levels[:number])

            def one(text: str, answer: Answer) -> None:
                if not stopped.is_set():
                    asked.one(text, answer)

            def done(answer: Answer, level: Level = level, before: int = before) -> None:
                if not stopped.is_set():
                    level.answers.append(answer)
                    tell(_clients(level), (before + len(level.answers)) / of)

            tell(_clients(level), before / of)
            texts = [asked.text() for _ in range(level.requests)]
            try:
                timing.closed_loop(texts, level.clients, one, done)
            except KeyboardInterrupt:
                stopped.set()
                return levels[: number + 1], True
    return levels, False


def _clients(level: Level) -> str:
    return "1 client" if level.clients == 1 else f"{level.clients} clients"


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return any(delta.get(key) for key in ("content", "reasoning_content", "reasoning"))


def _counts(text: str) -> list[int]:
    """ "1,8,32" as numbers. Raises BadParameter."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= MOST_CLIENTS for word in words):
        told = f"{text!r}: write numbers from 1 to {MOST_CLIENTS}, such as 1,8,32"
        raise typer.BadParameter(told, param_hint="--clients")
    return [int(word) for word in words]


def as_document(asked: Asked, levels: Sequence[Level], *, interrupted: bool) -> dict[str, Any]:
    """The result as JSON: rates a second, times in milliseconds, lengths in tokens."""
    return {
        "object": "bench",
        "schema": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "url": asked.server.url,
        "model": asked.model,
        "prompt_tokens": asked.prompt,
        "output_tokens": asked.output,
        "to_the_end": bool(asked.to_the_end),
        "counted_by": "usage" if asked.counted else "pieces of text",
        "interrupted": interrupted,
        "rows": [level.row() for level in levels],
    }
