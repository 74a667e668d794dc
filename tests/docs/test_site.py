"""The documentation as a site: built strictly, and asking nothing of another host."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

# what a browser loads by itself, as opposed to a link that somebody follows
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "form": "action"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make docs`, in another folder."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder),
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"make docs fails:\n{done.stdout}{done.stderr}"
    return folder


class Loaded(HTMLParser):
    """The addresses that a page has a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        name = LOADS.get(tag)
        if tag == "link" and found.get("rel") not in ("canonical", "prev", "next"):
            name = "href"
        if name is not None and (address := found.get(name)):
            self.addresses.append(address)


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site: Path):
    for page in (ROOT / "docs").rglob("*.md"):
        made = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        reader = Loaded()
        reader.feed(made.read_text(encoding="utf-8"))
        assert len(reader.addresses) > 2, page
        foreign = [a for a in reader.addresses if re.match(r"(\w+:)?//", a)]
        assert foreign == [], page


def test_style_sheets_load_nothing_from_elsewhere(site: Path):
    sheets = list(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        text = sheet.read_text(encoding="utf-8")
        assert re.findall(r"(?:url\(|@import )[\"']?(?:\w+:)?//", text) == []


def test_the_command_for_it_is_a_target_of_the_makefile():
    assert re.search(
        r"^docs:.*\n(?:\t.*\n)*?\t.*mkdocs build --strict", (ROOT / "Makefile").read_text(), re.M
    )
