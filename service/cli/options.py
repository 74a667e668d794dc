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

from service.config.flags import Flags

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="The config file. Default: ./moorage.yaml."
    ),
]
Deployment = Annotated[
    str | None,
    typer.Option("--deployment", "-d", metavar="NAME", help="Which block of `deployments` to use."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Set one value, for example max_context=2048."
    ),
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Folder, hub id or known name.")
]
Strategy = Annotated[
    str | None, typer.Option("--strategy", metavar="NAME", help="The placement strategy.")
]
Quantize = Annotated[
    str | None, typer.Option("--quantize", metavar="FORMAT", help="none, nf4, fp4, int8 or int4.")
]
Bind = Annotated[
    str | None, typer.Option("--bind", metavar="ADDRESS", help="HOST:PORT or unix:PATH.")
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
