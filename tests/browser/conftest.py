"""A browser, two real servers, and pages on which nothing may go wrong unnoticed."""

import contextlib
import json
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from playwright.sync_api import ConsoleMessage
from playwright.sync_api import Page
from playwright.sync_api import expect

from tests.browser import browser as chromium
from tests.support.encoders import save_encoder
from tests.support.server import Server
from tests.support.server import running
from tests.support.tiny import CHATML
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_tokenizer

STRATEGIES = Path(__file__).parent / "strategies"
KEY = "sk-of-the-browser-tests"
# far from what anything takes; reached only when something is broken
WAIT_MS = 60_000
VIOLATIONS = """
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (event) =>
        window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""


# one for a file: Playwright runs an event loop in this thread as long as it lives
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium.found()
    if program is None:
        reason = f"no browser found: none of {', '.join(chromium.NAMES)} is on the PATH"
        if chromium.required():
            pytest.fail(f"{reason}, and {chromium.VARIABLE} says that there has to be one")
        pytest.skip(reason)
    expect.set_options(timeout=WAIT_MS)
    with chromium.launched(program) as running_browser:
        yield running_browser


@dataclass
class Watched:
    """A page, and what it did that no page of ours may do.

    expected: beginnings of console messages that this test causes.
    """

    page: Page
    url: str
    expected: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.said.append(message.text)

    def forbidden(self) -> list[str]:
        """What the policy forbade since this was asked last."""
        found: list[str] = self.page.evaluate("window.violations.splice(0)")
        return found

    def problems(self) -> list[str]:
        said = [text for text in self.said if not text.startswith(tuple(self.expected))]
        foreign = [url for url in self.asked if not url.startswith((self.url, "data:"))]
        return [*said, *foreign, *self.forbidden()]


Visit = Callable[..., Watched]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """visit(url, "/docs", expected=[...], color_scheme="dark", ...): a page in a fresh profile.

    Keywords are those of a Playwright context. When the test has ended: no console error, no
    exception, no request to another host, nothing that the policy had to forbid.
    """
    pages: list[Watched] = []

    def open_page(url: str, path: str = "/", *, expected: tuple[str, ...] = (), **words) -> Watched:
        context = browser.new_context(**words)
        context.set_default_timeout(WAIT_MS)
        context.add_init_script(VIOLATIONS)
        page = context.new_page()
        watched = Watched(page, url, list(expected))
        page.on("console", watched.console)
        page.on("pageerror", lambda error: watched.said.append(str(error)))
        page.on("request", lambda request: watched.asked.append(request.url))
        pages.append(watched)
        page.goto(f"{url}{path}")
        return watched

    yield open_page
    found = [problem for watched in pages for problem in watched.problems()]
    for watched in pages:
        watched.page.context.close()
    assert found == []


@contextlib.contextmanager
def talking(folder: Path, **words: object) -> Iterator[Server]:
    """A server that says the letter a, slowly, until it is told to stop. It loads when `open_gate`
    was called. words: of its deployment, beside the model.
    """
    save_tiny(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "model")
    found = {"model": str(folder / "model"), "strategy_dirs": [str(STRATEGIES)], **words}
    _write(folder, found)
    with running(folder, OMP_NUM_THREADS="1") as server:
        yield server


def open_gate(server: Server) -> None:
    (server.log.parent / "gate").touch()


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that is ready."""
    folder = tmp_path_factory.mktemp("talking")
    with talking(folder, strategy="talking") as server:
        open_gate(server)
        yield server.wait_ready()


@pytest.fixture(scope="session")
def locked_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that needs KEY, with a model that gives embeddings."""
    folder = tmp_path_factory.mktemp("locked")
    _write(folder, {"model": str(save_encoder(folder / "model")), "strategy": "cpu"})
    with running(folder, OMP_NUM_THREADS="1", MOORAGE_API_KEYS=KEY) as server:
        yield server.wait_ready()


def _write(folder: Path, words: dict[str, object]) -> None:
    document = {"version": 1, "deployments": {"here": words}}
    (folder / "moorage.yaml").write_text(json.dumps(document))  # JSON is YAML
