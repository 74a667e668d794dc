"""docs/faults.md and tests/faults name the same faults; what is tested elsewhere is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
NAMED = r"(?:tests/\w+/test_\w+\.py::)?test_\w+"
ROWS = re.findall(rf"^\| (?!what |---)(.+) \| `({NAMED})` \|$", PAGE, re.MULTILINE)


def functions_of(path: Path) -> list[str]:
    return [
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_every_row_names_a_test_and_every_test_has_a_row():
    paths = sorted((ROOT / "tests/faults").glob("test_*.py"))
    named = [test for _, test in ROWS]
    assert len(set(named)) == len(named)
    assert {name for name in named if "::" not in name} == {
        test for path in paths for test in functions_of(path)
    }
    for name in named:
        path, elsewhere, test = name.rpartition("::")
        assert not elsewhere or test in functions_of(ROOT / path)


def test_a_row_says_what_happens_what_is_answered_and_what_is_logged():
    lines = re.findall(r"^\| (?!what |---)", PAGE, re.MULTILINE)
    assert len(lines) == len(ROWS)
    for row, _ in ROWS:
        happens, answer, _ = (cell.strip() for cell in row.split("|", 2))
        assert happens
        assert answer
