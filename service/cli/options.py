"""Options that several commands share, and how they become the flags layer of the config.

A command declares what it needs and hands the values on:

    @app.command()
    @report.guard
    def plan(
        config: Config = None, deployment: Deployment = None, settings: Set = None,
        model: Model = None, as_json: AsJson = False,
    ) -> None:
        loaded = reading.load_process(flags(config, deployment, settings, model=model))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from service.cli import completing
from service.cli.asking import Server
from service.config import variables
from service.config.environment import process_environment
from service.config.flags import Flags
from service.config.reading import load_process
from service.config.ready_line import reachable

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="The config file. Default: ./moorage.yaml."
    ),
]
Deployment = Annotated[
    str | None,
    typer.Option(
        "--deployment",
        "-d",
        metavar="NAME",
        help="Which block of `deployments` to use.",
        autocompletion=completing.deployments,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Set one value, for example max_context=2048.",
        autocompletion=completing.keys,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Folder, hub id or known name.",
        autocompletion=completing.models,
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help="The placement strategy.",
        autocompletion=completing.strategies,
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="FORMAT",
        help="none, nf4, fp4, int8 or int4.",
        autocompletion=completing.formats,
    ),
]
Bind = Annotated[
    str | None, typer.Option("--bind", metavar="ADDRESS", help="HOST:PORT or unix:PATH.")
]
Url = Annotated[
    str | None,
    typer.Argument(
        metavar="URL",
        help="Such as http://HOST:PORT or unix:PATH. Default: the address in the config.",
        show_default=False,
    ),
]
ServedModel = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="As the server calls it. Default: the first it lists."
    ),
]
NoColor = Annotated[
    bool, typer.Option("--no-color", help="No colours; so do NO_COLOR and TERM=dumb.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def flags(
    config: Path | None = None,
    deployment: str | None = None,
    settings: Sequence[str] | None = None,
    *,
    model: str | None = None,
    strategy: str | None = None,
    quantize: str | None = None,
    bind: str | None = None,
) -> Flags:
    """The flags layer. A flag of its own wins over --set; of two --set the later wins.

    Raises typer.BadParameter (exit status 2) for a --set without "=".
    """
    named = (
        ("model", model, "--model"),
        ("strategy", strategy, "--strategy"),
        ("quantize", quantize, "--quantize"),
        ("server.bind", bind, "--bind"),
    )
    return Flags(
        config,
        deployment,
        (
            *(_setting(text) for text in settings or ()),
            *((key, value, flag) for key, value, flag in named if value is not None),
        ),
    )


def _setting(text: str) -> tuple[str, str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise typer.BadParameter(
            f"{text!r} is not KEY=VALUE; write for example --set max_context=2048"
        )
    return key.strip(), value, "--set"


def server(url: str | None, config: Path | None, deployment: str | None) -> Server:
    """The server that is meant: `url`, else where the configuration serves. The key that is sent is
    a variable's, else, for the configuration's own server, its first.

    Raises typer.BadParameter for another URL, ConfigError.
    """
    key = variables.client_key(process_environment())
    if url is None:
        loaded = load_process(flags(config, deployment))
        url = reachable(loaded.server.bind)
        if url.endswith(":0"):
            told = "server.bind says any free port: give the URL that the server's log shows"
            raise typer.BadParameter(told, param_hint="URL")
        if key is None and loaded.api_keys:
            key = loaded.api_keys[0].key.get_secret_value()
    try:
        return Server(url, key)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="URL") from None


def cache() -> Path:
    """The cache folder of this process."""
    folder, _ = variables.cache(process_environment())
    return folder
