"""The blocks of the pages, with what the comments right before them say.

A shell block (```sh) is run by `tests/docs/test_commands.py`, in the page's order, unless a comment
right before it says otherwise:

    <!-- not run: needs Docker -->                     a reason
    <!-- run by: tests/docs/test_plugin_guide.py -->   another test

What a block needs and does is said by the same means: `<!-- file: moorage.yaml -->` before a block
of any language writes it to the folder in which the page's commands run, `<!-- exit: 4 -->` is the
status of a block that fails, and a block after `<!-- output -->` is what the shell block before it
prints. Its numbers and bars may differ, and `...` is any text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
MARKS = {"not run", "run by", "file", "exit", "output"}
SHELLS = {"sh", "bash", "shell", "console"}


@dataclass(frozen=True)
class Block:
    """line: of its fence, from 1. marks: "exit" -> "4", for the comments right before it."""

    page: Path
    line: int
    language: str
    text: str
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run_here(self) -> bool:
        """Whether it is a shell block that nothing exempts."""
        return self.language in SHELLS and not {"not run", "run by"} & self.marks.keys()


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        opened = re.fullmatch(r"( *)```([\w-]*).*", lines[number])
        if opened is None:
            number += 1
            continue
        indent, language = opened.groups()
        end = next(n for n in range(number + 1, len(lines)) if lines[n] == f"{indent}```")
        text = "\n".join(line.removeprefix(indent) for line in lines[number + 1 : end]) + "\n"
        yield Block(page, number + 1, language, text, _marks(lines, number))
        number = end + 1


def _marks(lines: list[str], number: int) -> dict[str, str]:
    """Of the comments that end above this line, empty lines between them allowed."""
    found = {}
    while number > 0:
        line = lines[number - 1].strip()
        mark = re.fullmatch(r"<!-- ([a-z ]+?)(?:: (.*))? -->", line)
        if mark is not None and mark[1] in MARKS:
            found[mark[1]] = mark[2] or ""
        elif line:
            break
        number -= 1
    return found
