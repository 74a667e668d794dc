"""The other pages name what exists: functions, errors, exit statuses, links."""

import importlib
import re
from pathlib import Path

import pytest

from service.errors import ServiceError
from service.errors import StartupError
from service.web import errors_reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_reference_of_errors_is_what_their_classes_say():
    said = "run: python -m service.web.errors_reference > docs/errors.md"
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    assert page == errors_reference.markdown(), said
    without = [kind for kind in errors_reference.kinds(ServiceError) if not kind.__doc__]
    assert without == []


@pytest.mark.parametrize("dotted", sorted(set(re.findall(r"`(service(?:\.\w+)+)`", ARCHITECTURE))))
def test_every_function_of_the_two_flows_exists(dotted: str):
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return
    raise AssertionError(dotted)


@pytest.mark.parametrize("room", sorted(p.name for p in (ROOT / "service").iterdir()))
def test_every_room_is_in_the_architecture(room: str):
    if not room.startswith("__"):
        assert re.search(rf"`service/{re.escape(room)}/?`", ARCHITECTURE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(((?!http)[\w/.-]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_exit_status_is_told():
    page = (ROOT / "docs/operations.md").read_text()
    for kind in errors_reference.kinds(StartupError):
        assert f"| {kind.exit_status} |" in page
