"""`moorage config`: what is in effect and why, the schema, a starter file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

import typer

from service.cli import options
from service.cli import report
from service.errors import ConfigError
from service.errors import Problem

if TYPE_CHECKING:
    from service.config.origin import Origin
    from service.config.schema import Config

app = typer.Typer(
    name="config", help="What is configured and why.", no_args_is_help=True, add_completion=False
)

STARTER_NAME = "moorage.yaml"
SCHEMA_NAME = "moorage.schema.json"


@app.command()
@report.guard
def show(
    config: options.Config = None,
    deployment: options.Deployment = None,
    settings: options.Set = None,
    model: options.Model = None,
    strategy: options.Strategy = None,
    quantize: options.Quantize = None,
    bind: options.Bind = None,
    origin: Annotated[
        bool, typer.Option("--origin", help="Say where each value came from.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Print the configuration in effect, in the form of a config file.

    The strategy's own defaults are not part of it; `moorage plan` shows them. API keys are counted
    and never shown.
    """
    from service.config import reading

    loaded = reading.load_process(
        options.flags(
            config,
            deployment,
            settings,
            model=model,
            strategy=strategy,
            quantize=quantize,
            bind=bind,
        )
    )
    if as_json:
        report.print_json(as_document(loaded))
        return
    typer.echo("\n".join(as_yaml(loaded, with_origin=origin)))
    report.print_notices(loaded.notices)


@app.command()
@report.guard
def schema(as_json: options.AsJson = False) -> None:
    """Print the JSON schema of moorage.yaml, for editors. It is JSON with and without --json."""
    from service.config import reference

    report.print_json(reference.json_schema())


@app.command()
@report.guard
def init(
    path: Annotated[Path, typer.Argument(help="File to write, or a folder for it.")] = Path(
        STARTER_NAME
    ),
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a commented starter file, and the schema for editors beside it."""
    from service.config import reference
    from service.config.starter import STARTER

    target = path / STARTER_NAME if path.is_dir() else path
    files = {
        target: STARTER,
        target.parent / SCHEMA_NAME: json.dumps(reference.json_schema(), indent=2) + "\n",
    }
    write_new(files, overwrite=force)
    if as_json:
        report.print_json({"written": [str(file) for file in files]})
        return
    for file in files:
        typer.echo(f"wrote {file}")


def write_new(files: Mapping[Path, str], *, overwrite: bool) -> None:
    """Write all of these files or, if one is there and differs, none.

    Raises ConfigError naming what is in the way.
    """
    try:
        problems = [
            Problem(str(file), "", "is there already; --force overwrites it")
            for file, text in files.items()
            if not overwrite and file.exists() and file.read_bytes() != text.encode()
        ]
        if problems:
            raise ConfigError(problems)
        for file, text in files.items():
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        where = str(error.filename or next(iter(files)))
        raise ConfigError([Problem(where, "", f"cannot be written: {error.strerror}")]) from None


def as_document(config: "Config") -> dict[str, Any]:
    """The configuration as JSON: values, origins, notices; the number of API keys, not the keys."""
    return {
        "path": None if config.path is None else str(config.path),
        "deployment": config.name,
        "deployments": list(config.deployments),
        "server": config.server.model_dump(mode="json"),
        "values": config.deployment.model_dump(mode="json"),
        "cache": str(config.cache),
        "api_keys": len(config.api_keys),
        "origins": {key: str(origin) for key, origin in config.origins.items()},
        "notices": list(config.notices),
    }


def as_yaml(config: "Config", *, with_origin: bool) -> list[str]:
    """Lines in the form of a config file, each with its origin as a comment if asked."""
    origins = config.origins
    lines: list[tuple[str, Origin | str | None]] = [
        ("version: 1", None),
        (f"deployment: {_flow(config.name)}", origins["deployment"]),
        ("server:", None),
    ]
    for key, value in config.server.model_dump(mode="json").items():
        lines.append((f"  {key}: {_flow(value)}", origins[f"server.{key}"]))
    lines += [("deployments:", None), (f"  {_flow(config.name)}:", None)]
    for key, value in config.deployment.model_dump(mode="json").items():
        lines.append((f"    {key}: {_flow(value)}", origins[key]))
    lines += [
        (f"# cache: {config.cache}", origins["cache"]),
        (f"# API keys: {len(config.api_keys)}", origins["api_keys"]),
    ]
    if not with_origin:
        return [text for text, _ in lines]
    width = max(len(text) for text, _ in lines)
    return [
        text if origin is None else f"{text.ljust(width)}  # {origin}" for text, origin in lines
    ]


def _flow(value: Any) -> str:
    """A value as YAML in one line. Text is plain where it reads back as the same text."""
    from service.config.yaml_file import parse_value

    if isinstance(value, dict):
        entries = (f"{_flow(key)}: {_flow(item)}" for key, item in value.items())
        return "{" + ", ".join(entries) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        plain = parse_value(f"[{value}]") == [value] and value.isprintable()
    except ValueError:
        plain = False
    if plain:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)
