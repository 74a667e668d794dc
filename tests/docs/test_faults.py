"""docs/faults.md and tests/faults name the same faults."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (?!what |---)(.+) \| `(test_\w+)` \|$", PAGE, re.MULTILINE)


def test_every_row_names_a_test_and_every_test_has_a_row():
    tests = [
        node.name
        for path in sorted((ROOT / "tests/faults").glob("test_*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    named = [test for _, test in ROWS]
    assert len(set(named)) == len(named)
    assert set(named) == set(tests)


def test_a_row_says_what_happens_what_is_answered_and_what_is_logged():
    lines = re.findall(r"^\| (?!what |---)", PAGE, re.MULTILINE)
    assert len(lines) == len(ROWS)
    for row, _ in ROWS:
        happens, answer, _ = (cell.strip() for cell in row.split("|", 2))
        assert happens
        assert answer
