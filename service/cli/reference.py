"""The reference of the command line, made from the commands themselves.

`python -m service.cli.reference` prints docs/cli.md.
"""

import sys
from typing import Any

import typer
from typer.cli import get_docs_for_click

from service.cli.main import app

INTRODUCTION = """\
# The command line

<!-- Made by `python -m service.cli.reference > docs/cli.md`; a test compares. -->

Exit statuses are in [operations.md](operations.md#exit-statuses). `--config`, `--deployment` and
`--set` mean the same in every command, and so does `--json`: one JSON document on standard output,
also for an error. Commands read the same layers as the server does: [config.md](config.md#layers).
"""


def markdown() -> str:
    """docs/cli.md."""
    command: Any = typer.main.get_command(app)
    _summaries(command)
    context = command.context_class(command, info_name="moorage")
    made = get_docs_for_click(obj=command, ctx=context, name="moorage")
    _, _, text = made.partition("\n\n")  # its title
    # the usage line is no command to run, and its $ none to copy
    text = text.replace("```console\n$ ", "```text\n").replace("**:\n", ":**\n")
    return f"{INTRODUCTION}\n{text.strip()}\n"


def _summaries(command: Any) -> None:
    """Lists of commands say the first sentence of each, not its first 45 characters."""
    for name, part in getattr(command, "commands", {}).items():
        if not part.help:
            raise SystemExit(f"{name} has no docstring")
        first, stop, _ = " ".join(part.help.split()).partition(". ")
        part.short_help = first.removesuffix(".") + "." if stop else first
        _summaries(part)


if __name__ == "__main__":
    sys.stdout.write(markdown())
