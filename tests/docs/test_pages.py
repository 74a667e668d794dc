"""The other pages name what exists: functions, errors, exit statuses, links."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
ERRORS = (ROOT / "docs/errors.md").read_text(encoding="utf-8")


def kinds(base: type[errors.ServiceError]) -> Iterator[type[errors.ServiceError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


GROUPS = {errors.StartupError, errors.RequestError}
KINDS = [kind for kind in kinds(errors.ServiceError) if kind not in GROUPS]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_told_with_its_status_and_code(kind: type[errors.ServiceError]):
    row = re.search(rf"^\| `{kind.__name__}` \| (.*)$", ERRORS, re.MULTILINE)
    assert row, f"docs/errors.md lacks {kind.__name__}"
    assert f"`{kind.code}`" in row[1]
    status = kind.exit_status if issubclass(kind, errors.StartupError) else kind.status
    assert re.search(rf"(^|\| ){status} \|", row[1])


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
    for kind in KINDS:
        if issubclass(kind, errors.StartupError):
            assert f"| {kind.exit_status} |" in page
