"""`moorage certify`: load a model, prove its placement, and let it go again."""

from typing import TYPE_CHECKING
from typing import Any

import typer

from service.cli import options
from service.cli import report
from service.config import reading
from service.config.schema import Config

if TYPE_CHECKING:
    from service.placement.certificate import Certificate
    from service.placement.hardware import Hardware
    from service.placement.loading import Loaded


@report.guard
def certify(
    config: options.Config = None,
    deployment: options.Deployment = None,
    settings: options.Set = None,
    model: options.Model = None,
    strategy: options.Strategy = None,
    quantize: options.Quantize = None,
    as_json: options.AsJson = False,
) -> None:
    """Plan, load and prove without serving. Exit status 8 if the certificate is refused.

    Only the deployment's own strategy is tried, none of its `fallback`.
    """
    flags = options.flags(
        config, deployment, settings, model=model, strategy=strategy, quantize=quantize
    )
    words = reading.load_process(flags)
    report.print_notices(words.notices)
    loaded, machine = _load(words)

    from service.placement import certificate as proof
    from service.placement.describe import plan_warnings

    made = proof.certify(loaded)
    warnings = [
        *loaded.placement.notes,
        *loaded.notes,
        *plan_warnings(loaded.placement, made.plan_errors),
    ]
    failure = made.failure()
    if as_json:
        report.print_json(document(loaded, machine, made, warnings))
    else:
        _print(loaded, made, warnings)
    if failure is not None:
        report.print_error(failure)
    loaded.strategy.release(loaded.model)
    if failure is not None:
        raise typer.Exit(failure.exit_status)


def _load(words: Config) -> "tuple[Loaded, Hardware]":
    from service.placement.chain import steps

    _, (first, *_) = steps(words)
    chosen = first.strategy

    from service.models.locate import locate
    from service.placement import hardware
    from service.placement import loading

    located = first.settle(locate(words))
    machine = hardware.detect(located.offload_folder or words.cache)
    placement = chosen.plan(located, machine)
    return loading.load(chosen, located, placement, lambda share: None), machine


def document(
    loaded: "Loaded", machine: "Hardware", made: "Certificate", warnings: list[str]
) -> dict[str, Any]:
    """The certificate as JSON; `devices` and `certificate` as on /placement. Times in seconds."""
    from service.placement import describe

    failure, placement = made.failure(), loaded.placement
    return {
        "object": "certificate",
        "schema": 1,
        "deployment": loaded.config.deployment,
        "model": {
            "id": loaded.config.model_id,
            "parameters": placement.parameters,
            "dtype": placement.dtype,
            "quantize": loaded.config.quantize,
        },
        "strategy": {"name": loaded.strategy.name, "source": loaded.strategy.source},
        "load_seconds": round(loaded.seconds, 3),
        "devices": describe.devices(placement, machine, made),
        "certificate": made.as_dict(),
        "warnings": warnings,
        "error": None if failure is None else failure.as_dict(),
    }


def _print(loaded: "Loaded", made: "Certificate", warnings: list[str]) -> None:
    config = loaded.config
    head = (
        f"deployment {config.deployment}",
        config.model_id,
        f"strategy {loaded.strategy.name}",
        f"quantize {config.quantize}",
    )
    typer.echo("   ".join(head))
    report.print_table(
        ("check", "result", "checked", "ms"),
        (
            (check.name, check.status, f"{check.checked:,}", f"{check.seconds * 1000:.1f}")
            for check in made.checks
        ),
    )
    for device, size in made.devices.items():
        planned = loaded.placement.memory.get(device)
        told = "" if planned is None else f", {planned.weights:,} planned"
        typer.echo(f"{device}: {size:,} bytes of weights{told}")
    for warning in warnings:
        typer.echo(f"note  {warning}")
    word = "PROVEN" if made.valid else "REFUSED"
    typer.echo(f"{word} in {made.seconds:.2f} s after a load of {loaded.seconds:.2f} s.")
