"""Chromium, as it is on this machine, driven by Playwright."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# "required": tests fail where there is no browser, instead of being skipped. Its name does not
# begin with MOORAGE_, because the configuration refuses such names that it does not know.
VARIABLE = "TEST_BROWSER"


def found() -> str | None:
    """The program of a browser, or None if none is on the PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def required() -> bool:
    return os.environ.get(VARIABLE) == "required"


@contextlib.contextmanager
def launched(program: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()
