"""What is different where a person reads it: colours, the width of the window, bars.

Into a pipe goes plain text, every line whole. NO_COLOR and TERM=dumb are honoured; --no-color sets
the former, so that the processes that a command starts do as it does.
"""

import contextlib
import sys
import textwrap
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from service.config.bar import Bar
from service.config.bar import takes_bars
from service.config.environment import process_environment

if TYPE_CHECKING:
    from rich.console import Console

PIPE_COLUMNS = 120
"""How wide tables are made that are not for a terminal; COLUMNS overrides it."""
MARK = "\u2026"

Styles = Sequence[tuple[str, str]]
"""Regular expressions and how what they match looks: ("FITS", "bold green")."""


def console(*, stderr: bool = False) -> "Console":
    """Prints lines as they are, in colours where they may be."""
    from rich.console import Console

    return Console(
        stderr=stderr,
        color_system=None if process_environment().get("NO_COLOR") else "auto",
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )


def columns() -> int | None:
    """Of the terminal that stdout is; None if it is none."""
    return console().width if sys.stdout.isatty() else None


def table_columns() -> int:
    """How wide a table may be."""
    told = process_environment().get("COLUMNS", "")
    given = int(told) if told.isdecimal() and int(told) else PIPE_COLUMNS
    return columns() or given


def say(line: str, styles: Styles = (), *, stderr: bool = False) -> None:
    """One line on stdout; what an expression of `styles` matches has that style."""
    from rich.text import Text

    text = Text(line)
    for pattern, style in styles:
        text.highlight_regex(pattern, style)
    console(stderr=stderr).print(text)


def fold(text: str, width: int | None, hang: int = 0) -> list[str]:
    """The text in lines of at most `width`, those after the first indented by `hang`.

    None: in one line, as a program wants it. Words that are wider, such as long paths, are cut.
    """
    if width is None or len(text) <= width:
        return [text]
    return textwrap.wrap(
        text,
        max(width, hang + 10),
        subsequent_indent=" " * hang,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )


def flow(parts: Sequence[str], width: int | None) -> list[str]:
    """Parts side by side, broken only between two of them if they fit at all; None: one line."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}   {part}"
        if width is None or len(longer) <= width:
            lines[-1] = longer
        else:
            lines += fold(f"  {part}", width, 4)
    return lines


def shorten(text: str, width: int) -> str:
    """At most `width` characters; what is left out is marked."""
    return text if len(text) <= width else text[: max(0, width - 1)] + MARK


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Gives a function that is told what is done and how much of it is behind us (0 to 1).

    A bar on a terminal, else one line for each thing that is done; both on stderr.
    """
    if not takes_bars(sys.stderr):
        said: set[str] = set()

        def line(doing: str, share: float) -> None:
            if doing not in said:
                said.add(doing)
                typer.echo(f"{share:4.0%}  {doing}", err=True)

        yield line
        return
    now = [("", 0.0)]

    def note(doing: str, share: float) -> None:
        now[0] = (doing, share)

    # what is redirected meanwhile does not concern the bar: it keeps the real stderr
    bar = Bar(sys.stderr, lambda: now[0])
    try:
        yield note
    finally:
        bar.stop()
