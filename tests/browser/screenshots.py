"""Pictures of the page of a running server, for the documentation.

    python -m tests.browser.screenshots http://127.0.0.1:8000 docs/images

It asks the model something, opens the modules of the first device and writes page-light.png,
page-dark.png and page-phone.png.
"""

import argparse
from pathlib import Path

from playwright.sync_api import Browser

from tests.browser import browser

QUESTION = "What is the capital of France?"
VIEWS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1360, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1360, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 375, "height": 812}},
}
ANSWERED = "() => /request/.test(document.getElementById('try-said').textContent)"
STOPPED = "() => !document.querySelector('deep-chat').shadowRoot.getElementById('stop-icon')"
# so that the lines of the last two minutes show what one answer looks like
PAUSE_MS = 2500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--full", action="store_true", help="the whole page, not what one sees first"
    )
    given = parser.parse_args()
    program = browser.found()
    if program is None:
        raise SystemExit(f"no browser found: none of {', '.join(browser.NAMES)} is on the PATH")
    given.folder.mkdir(parents=True, exist_ok=True)
    with browser.launched(program) as running:
        for name in VIEWS:
            take(running, given.url, name, given.folder / f"page-{name}.png", full=given.full)


def take(running: Browser, url: str, name: str, path: Path, *, full: bool) -> None:
    context = running.new_context(**VIEWS[name], device_scale_factor=1)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(url)
    box = page.get_by_role("textbox", name="Message")
    box.click(timeout=60_000)
    page.wait_for_timeout(PAUSE_MS)
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_function(ANSWERED, timeout=120_000)
    page.wait_for_function(STOPPED, timeout=120_000)
    page.wait_for_timeout(PAUSE_MS)
    page.locator(".toggle").first.click()
    page.locator(".treemap canvas").wait_for()
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(500)
    page.screenshot(path=path, full_page=full)
    context.close()


if __name__ == "__main__":
    main()
