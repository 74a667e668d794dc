"""`moorage plugins`: which strategies there are, and what each can be told."""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

import typer

from service.cli import completing
from service.cli import options
from service.cli import report
from service.config import reading
from service.config.schema import DeploymentConfig
from service.config.suggesting import did_you_mean
from service.errors import PluginError

if TYPE_CHECKING:
    from service.config.schema import Config
    from service.placement.registry import Registry
    from service.placement.registry import Strategy

TINY_MODEL = (
    "A folder with a small model of your own, or one of our tiny ones by its architecture, such as "
    "qwen3_moe. Default: a tiny Llama."
)
app = typer.Typer(no_args_is_help=True, help="The placement strategies: list, show, check, new.")


@app.command("list")
@report.guard
def list_all(
    config: options.Config = None,
    deployment: options.Deployment = None,
    as_json: options.AsJson = False,
) -> None:
    """Every strategy that was found, built in, installed or in `strategy_dirs`."""
    registry = registry_of(config, deployment)
    if as_json:
        report.print_json(
            {
                "strategies": [_describe(s) for _, s in sorted(registry.strategies.items())],
                "broken": [
                    {"name": name, "error": error.as_dict()}
                    for name, error in sorted(registry.broken.items())
                ],
            }
        )
        return
    rows = [(s.name, s.source, s.summary) for _, s in sorted(registry.strategies.items())]
    rows += [(name, "broken", error.one_line()) for name, error in sorted(registry.broken.items())]
    report.print_table(("NAME", "SOURCE", "SUMMARY"), rows)


@app.command()
@report.guard
def show(
    name: Annotated[
        str, typer.Argument(help="The strategy's name.", autocompletion=completing.strategies)
    ],
    config: options.Config = None,
    deployment: options.Deployment = None,
    as_json: options.AsJson = False,
) -> None:
    """One strategy: where it comes from, its options and its own defaults."""
    registry = registry_of(config, deployment)
    if name in registry.broken:
        raise registry.broken[name]
    if name not in registry.strategies:
        known = sorted({*registry.strategies, *registry.broken})
        raise typer.BadParameter(
            f"there is no strategy {name!r}{did_you_mean(name, known)}; there is {', '.join(known)}"
        )
    strategy = registry.strategies[name]
    if as_json:
        report.print_json(_describe(strategy))
        return
    typer.echo(f"{strategy.name}  {strategy.source}\n{strategy.summary}")
    typer.echo("\noptions" if strategy.options_schema else "\noptions: none")
    if strategy.options_schema:
        report.print_table(("KEY", "TYPE", "DEFAULT", "MEANING"), _option_rows(strategy))
    if strategy.defaults:
        typer.echo("\ndefaults of its own, below what the config says")
        report.print_table(("KEY", "VALUE"), sorted(strategy.defaults.items()))


@app.command()
@report.guard
def check(
    name_or_file: Annotated[
        str,
        typer.Argument(
            help="The strategy's name, or its file.", autocompletion=completing.strategies
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help=TINY_MODEL),
    ] = None,
    config: options.Config = None,
    deployment: options.Deployment = None,
    settings: options.Set = None,
    as_json: options.AsJson = False,
) -> None:
    """Hold a strategy to its contract, with a tiny model on this machine. Status 7 if it fails."""
    loaded = reading.load_process(options.flags(config, deployment, settings))
    report.print_notices(loaded.notices)
    words = _said(loaded)

    from service.testing import case
    from service.testing import examining

    with tempfile.TemporaryDirectory(prefix="moorage-check-") as folder:
        dirs = loaded.deployment.strategy_dirs
        try:
            results = examining.examine(
                name_or_file, Path(folder), model=model, strategy_dirs=dirs, settings=words
            )
        except (case.UnknownStrategy, case.UnknownModel) as error:
            raise typer.BadParameter(str(error)) from None
    count = Counter(result.status for result in results)
    if as_json:
        report.print_json(
            {
                "object": "contract",
                "strategy": name_or_file,
                "passed": not count["fail"],
                "checks": [asdict(result) for result in results],
            }
        )
    else:
        rows = [(result.check, result.status, result.message) for result in results]
        report.print_table(("CHECK", "RESULT", "MESSAGE"), rows)
        typer.echo(f"{count['pass']} passed, {count['fail']} failed, {count['skip']} not run")
    if count["fail"]:
        raise typer.Exit(PluginError.exit_status)


def _said(loaded: "Config") -> dict[str, Any]:
    """The keys of the deployment that flags set: a strategy is checked with no other words."""
    said = {key for key, origin in loaded.origins.items() if origin.layer == "flag"}
    keys = {key.partition(".")[0] for key in said} & set(DeploymentConfig.model_fields)
    for key in sorted(keys & {"model", "strategy", "strategy_dirs", "fallback"}):
        raise typer.BadParameter(f"{key} cannot be set: one strategy is checked, with a tiny model")
    words = {key: getattr(loaded.deployment, key) for key in keys}
    if "options" in words:
        given = loaded.deployment.options.items()
        words["options"] = {key: value for key, value in given if f"options.{key}" in said}
    return words


def registry_of(config: Any, deployment: str | None) -> "Registry":
    """The strategies as the selected deployment sees them."""
    from service.placement import registry

    loaded = reading.load_process(options.flags(config, deployment))
    report.print_notices(loaded.notices)
    return registry.build(loaded.deployment.strategy_dirs)


def _describe(strategy: "Strategy") -> dict[str, Any]:
    schema = strategy.options_schema
    return {
        "name": strategy.name,
        "source": strategy.source,
        "summary": strategy.summary,
        "options": None if schema is None else schema.model_json_schema(),
        "defaults": dict(strategy.defaults),
    }


def _option_rows(strategy: "Strategy") -> list[tuple[str, str, str, str]]:
    if strategy.options_schema is None:
        return []
    schema = strategy.options_schema.model_json_schema()
    required = schema.get("required", [])
    return [
        (
            key,
            _type(value),
            "(required)" if key in required else str(value.get("default", "-")),
            str(value.get("description", "")),
        )
        for key, value in schema.get("properties", {}).items()
    ]


def _type(value: Mapping[str, Any]) -> str:
    if "enum" in value:
        return " | ".join(str(choice) for choice in value["enum"])
    if "anyOf" in value:
        return " | ".join(_type(choice) for choice in value["anyOf"])
    return str(value.get("type", value.get("$ref", "any"))).rpartition("/")[2]
