"""What commands print: tables and JSON on stdout, notices and errors on stderr."""

import functools
import inspect
import json
import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from itertools import chain
from typing import Any
from typing import ParamSpec

import typer

from service.cli import options
from service.cli import terminal
from service.config.environment import forbid_colours
from service.config.environment import process_environment
from service.errors import ConfigError
from service.errors import ServiceError

P = ParamSpec("P")

STYLES = ((r"^moorage:", "bold red"), (r"^(note|warning):", "bold yellow"), (r"\bfix:", "bold"))


def guard(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into one message on stderr and an exit status.

    A ServiceError exits with its own `exit_status`; a ConfigError is printed in full, line by line.
    Anything else is a defect: one line and status 1, the traceback only with MOORAGE_DEBUG set.
    If the command has a parameter `as_json` and it is true, the error also goes to stdout as
    {"error": {...}}, so that a program which asked for JSON always gets some.

    Every command that is guarded has --no-color besides its own options.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        if kwargs.pop("no_color", False):
            forbid_colours()
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # typer knows what to do with these
        except ServiceError as error:
            if kwargs.get("as_json"):
                print_json({"error": error.as_dict()})
            print_error(error)
            raise typer.Exit(error.exit_status) from None
        except Exception as error:  # the CLI's top: nobody above could say it better
            if _debug():
                raise
            text = " ".join(str(error).split())
            typer.echo(
                f"moorage: unexpected {type(error).__name__}: {text}"
                "  (MOORAGE_DEBUG=1 shows the traceback)",
                err=True,
            )
            raise typer.Exit(1) from None

    no_color = inspect.Parameter(
        "no_color", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=options.NoColor
    )
    signature = inspect.signature(command)
    own = signature.parameters.values()
    guarded.__signature__ = signature.replace(parameters=[*own, no_color])  # type: ignore[attr-defined]
    guarded.__annotations__ = {**command.__annotations__, "no_color": options.NoColor}
    return guarded


def print_error(error: ServiceError) -> None:
    """The error on stderr: every problem of a ConfigError, one line of any other."""
    if not isinstance(error, ConfigError):
        terminal.say(f"moorage: {error.one_line()}", STYLES, stderr=True)
        return
    for problem in error.problems:
        typer.echo(str(problem), err=True)
    if error.hint is not None:
        terminal.say(f"fix: {error.hint}", STYLES, stderr=True)


def print_notices(notices: Iterable[str]) -> None:
    """Sentences the operator should see, one a line on stderr."""
    for notice in notices:
        terminal.say(f"note: {notice}", STYLES, stderr=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout, indented, keys in the order given."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns as wide as their content, numbers to the right.

    On a terminal the last column is folded into what is left of the line, or goes below if that is
    little; a pipe sees all of it in one line.
    """
    lines = table_lines(headers, [[str(cell) for cell in row] for row in rows], terminal.columns())
    for number, line in enumerate(lines):
        terminal.say(line, ((".+", "bold"),) if number == 0 else TABLE_STYLES)


TABLE_STYLES = (
    (r"(?<=  )(pass|ok|yes)(?=  |$)", "green"),
    (r"(?<=  )(fail|broken)(?=  |$)", "bold red"),
)
NARROW = 24
"""Columns in which text is not worth being folded."""
NUMBER = re.compile(r"-?[\d,.]+( [A-Za-z]{1,3})?|-|")


def table_lines(
    headers: Sequence[str], rows: Sequence[Sequence[str]], columns: int | None
) -> list[str]:
    """The lines of `print_table` for a terminal of so many columns; None: for a pipe."""
    *first, last = zip(headers, *rows, strict=True)
    cells = [_aligned(column) for column in first]
    at = sum(len(column[0]) + 2 for column in cells)
    room = None if columns is None or _is_numbers(last) else columns - at
    if room is not None and room < min(NARROW, max(map(len, last))):
        beside = ["  ".join(own).rstrip() for own in zip(*cells, strict=True)]
        below = [terminal.fold(f"    {text}", columns, 4) for text in last]
        return [beside[0], *chain(*([b, *t] for b, t in zip(beside[1:], below[1:], strict=True)))]
    lines = []
    for *own, text in zip(*cells, _aligned(last) if _is_numbers(last) else last, strict=True):
        head, *rest = terminal.fold(text, room)
        lines.append("  ".join((*own, head)).rstrip())
        lines += [" " * at + line for line in rest]
    return lines


def _aligned(column: Sequence[str]) -> list[str]:
    """Heading and cells, all of one width."""
    width = max(map(len, column))
    if _is_numbers(column):
        return [cell.rjust(width) for cell in column]
    return [cell.ljust(width) for cell in column]


def _is_numbers(column: Sequence[str]) -> bool:
    cells = column[1:]
    return any(cells) and all(NUMBER.fullmatch(cell) for cell in cells)


def _debug() -> bool:
    return bool(process_environment().get("MOORAGE_DEBUG"))
