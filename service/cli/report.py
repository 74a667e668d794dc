"""What commands print: tables and JSON on stdout, notices and errors on stderr."""

import functools
import json
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import ParamSpec

import typer

from service.errors import ConfigError
from service.errors import ServiceError

P = ParamSpec("P")


def guard(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into one message on stderr and an exit status.

    A ServiceError exits with its own `exit_status`; a ConfigError is printed in full, line by line.
    Anything else is a defect: one line and status 1, the traceback only with MOORAGE_DEBUG set.
    If the command has a parameter `as_json` and it is true, the error also goes to stdout as
    {"error": {...}}, so that a program which asked for JSON always gets some.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
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

    return guarded


def print_error(error: ServiceError) -> None:
    """The error on stderr: every problem of a ConfigError, one line of any other."""
    if not isinstance(error, ConfigError):
        typer.echo(f"moorage: {error.one_line()}", err=True)
        return
    for problem in error.problems:
        typer.echo(str(problem), err=True)
    if error.hint is not None:
        typer.echo(f"fix: {error.hint}", err=True)


def print_notices(notices: Iterable[str]) -> None:
    """Sentences the operator should see, one a line on stderr."""
    for notice in notices:
        typer.echo(f"note: {notice}", err=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout, indented, keys in the order given."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Left-aligned columns as wide as their content, never cut, so a pipe sees everything."""
    lines = [tuple(headers), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def _debug() -> bool:
    from service.config.environment import process_environment

    return bool(process_environment().get("MOORAGE_DEBUG"))
