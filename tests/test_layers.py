"""A room imports only from rooms above it, heavy packages only where they compute."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# in the order data walks through them; see docs/architecture.md
ROOMS = [
    "errors",
    "config",
    "models",
    "placement",
    "engine",
    "testing",
    "text",
    "deployment",
    "web",
    "cli",
]
# what a strategy may see
PLUGINS_SEE = {"errors", "config", "models", "placement"}
HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes"}
FILES = sorted((ROOT / "service").rglob("*.py")) + sorted((ROOT / "plugins").glob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of the modules a file imports; those under `if TYPE_CHECKING:` do not run."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            module = node.module or ""
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def room_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "service" and len(parts) > 1 else None


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_room_has_its_place_in_the_order():
    rooms = {p.stem for p in (ROOT / "service").iterdir() if not p.name.startswith("__")}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_room_imports_only_from_rooms_above_it(path: Path):
    used = {room for dotted in imports(path) if (room := room_of(dotted)) in ROOMS}
    if path.parts[len(ROOT.parts)] == "plugins":
        assert used <= PLUGINS_SEE
        return
    room = path.relative_to(ROOT / "service").parts[0].removesuffix(".py")
    if room == "__init__":
        assert not used
        return
    below = {other for other in used if ROOMS.index(other) > ROOMS.index(room)}
    assert not below, f"{name(path)} imports from {below}, which lie below {room}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_plugins_know_plugins(path: Path):
    using = {dotted for dotted in imports(path) if dotted.split(".")[0] == "plugins"}
    if name(path) == "service/placement/finding.py":  # finds them by that name
        assert using == {"plugins"}
    else:
        assert not using


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_module_outgrows_one_job(path: Path):
    assert len(path.read_text().splitlines()) <= 420


def test_what_the_gunicorn_master_imports_has_no_torch():
    for path in (ROOT / "service/config").glob("*.py"):
        assert not {d.split(".")[0] for d in imports(path)} & HEAVY, name(path)


def test_no_room_is_called_after_what_it_is_not():
    for path in FILES:
        assert path.stem not in {"utils", "helpers", "common", "base", "types", "misc"}, name(path)
