"""The `moorage` command: puts the commands together. Nothing heavy here, so --help is instant."""

from typing import Annotated

import typer

from service import __version__
from service.cli import bench
from service.cli import certify
from service.cli import chat
from service.cli import config
from service.cli import doctor
from service.cli import model
from service.cli import plan
from service.cli import plugins
from service.cli import plugins_new
from service.cli import reload
from service.cli import serve

app = typer.Typer(
    name="moorage",
    help="Serve transformers models whose placement is planned, carried out, proven and watched.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve.serve)
app.command()(reload.reload)
app.command()(plan.plan)
app.command()(certify.certify)
app.command()(doctor.doctor)
app.command()(bench.bench)
app.command()(chat.chat)
plugins.app.command()(plugins_new.new)
app.add_typer(plugins.app, name="plugins")
app.add_typer(config.app, name="config")
app.add_typer(model.app, name="model")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"moorage {__version__}")
        raise typer.Exit


@app.callback()
def moorage(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Serve transformers models whose placement is planned, carried out, proven and watched."""


def main() -> None:
    """The console script's entry point."""
    app(prog_name="moorage")
