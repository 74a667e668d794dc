"""`moorage plan`: where the model would go, what fits, and what would."""

from dataclasses import replace
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

import typer

from service.cli import options
from service.cli import plan_text
from service.cli import report
from service.config import reading
from service.config.schema import Config
from service.errors import StartupError

if TYPE_CHECKING:
    from service.placement.explain import PlanReport
    from service.placement.hardware import Hardware
    from service.placement.why import Reason
    from service.testing.simulation import Simulation


@report.guard
def plan(
    config: options.Config = None,
    deployment: options.Deployment = None,
    settings: options.Set = None,
    model: options.Model = None,
    strategy: options.Strategy = None,
    quantize: options.Quantize = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="2x24GiB[,ram=64GiB]",
            help="Plan for a machine that is not here.",
        ),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="MODULE",
            help="Why this module is where it is, and what would move it.",
        ),
    ] = None,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="Also run the plan on accelerators that are not here (some seconds).",
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Say where the model would go, reading no weights. Exit status 4 if it does not fit, 8 if a
    simulation refutes it."""
    from service.placement import hardware as machines

    invented = None
    if hardware is not None:
        try:
            invented = machines.invent(hardware)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--hardware") from None
    flags = options.flags(
        config, deployment, settings, model=model, strategy=strategy, quantize=quantize
    )
    loaded = reading.load_process(flags)
    report.print_notices(loaded.notices)
    try:
        made, reason, simulation = _explain(loaded, invented, module, simulate)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--explain") from None
    if as_json:
        simulated = {} if simulation is None else {"simulation": simulated_document(simulation)}
        report.print_json(document(made) | _reason_document(reason) | simulated)
    else:
        plan_text.show(made, loaded, reason, simulation)
    failure = made.error or (simulation and simulation.error)
    if failure:
        raise typer.Exit(failure.exit_status)


def _explain(
    loaded: Config, invented: "Hardware | None", module: str | None, simulate: bool
) -> "tuple[PlanReport, Reason | None, Simulation | None]":
    """The plan, and if it fits the reason for one module's place and what a simulation showed.

    Raises ValueError for a module that the model does not have.
    """
    from service.models.locate import locate_for_plan
    from service.placement.chain import outlook
    from service.placement.chain import steps

    found, (first, *others) = steps(loaded)
    chosen = first.strategy
    located = locate_for_plan(loaded)
    settled = first.settle(located)

    from service.placement import hardware as machines
    from service.placement.explain import explain

    machine = invented or machines.detect(settled.offload_folder or loaded.cache)
    try:
        made = explain(settled, chosen, machine, found)
    except StartupError:
        for line in plan_text.in_order(outlook(others, located, machine)):
            typer.echo(line, err=True)  # beside the error
        raise
    if made.error is not None:
        made = replace(made, fallback=tuple(outlook(others, located, machine)))
    reason = simulation = None
    if module is not None and made.placement is not None:
        from service.placement.why import explain_module

        reason = explain_module(module, settled, chosen, machine, made.placement)
    if simulate:
        from service.testing import simulation as simulating

        simulation = (
            simulating.simulate(settled, chosen, made.placement)
            if made.placement is not None
            else simulating.Simulation("not simulated", "it does not fit")
        )
    return made, reason, simulation


def simulated_document(simulation: "Simulation") -> dict[str, Any]:
    """What a simulation showed, as JSON. `error` is null unless it refuted the plan."""
    error = simulation.error
    return {
        "status": simulation.status,
        "message": simulation.message or None,
        "devices": list(simulation.devices),
        "operators": simulation.operators,
        "kv": dict(simulation.kv),
        "left_out": list(simulation.left_out),
        "seconds": simulation.seconds,
        "error": None if error is None else error.as_dict(),
    }


def _reason_document(reason: "Reason | None") -> dict[str, Any]:
    if reason is None:
        return {}
    moves = [{"try": flag, "device": device} for flag, device in reason.moves]
    return {
        "explain": {
            "module": reason.unit.name,
            "device": reason.device,
            "weights": reason.unit.weights,
            "kv": reason.unit.kv,
            "because": list(reason.sentences),
            "moves": moves,
        }
    }


def document(made: "PlanReport") -> dict[str, Any]:
    """The report as JSON, keys as on /placement where both have them. Sizes in bytes."""
    placement, config = made.placement, made.config
    return {
        "object": "plan",
        "schema": 1,
        "fits": made.error is None,
        "deployment": config.deployment,
        "model": {
            "id": config.model_id,
            "parameters": placement.parameters if placement else None,
            "dtype": placement.dtype if placement else None,
            "quantize": config.quantize,
        },
        "strategy": config.strategy,
        "kv": {
            "bytes_per_token": placement.kv_bytes_per_token if placement else None,
            "planned_tokens": placement.kv_tokens if placement else None,
            "room_tokens": made.room_tokens if placement else None,
        },
        "devices": [
            {
                "id": device.id,
                "name": device.name,
                "total": device.total,
                "free": device.free,
                "planned": {
                    "weights": device.planned.weights,
                    "kv": device.planned.kv,
                    "overhead": device.planned.overhead,
                },
                "overhead_parts": dict(device.planned.parts),
                "left": device.left,
                "modules": [{"name": name, "count": count} for name, count in device.modules],
            }
            for device in made.devices
        ],
        "error": None if made.error is None else made.error.as_dict(),
        "alternatives": [
            {"what": a.what, "try": a.flag, "weights": a.weights, "left": list(a.left)}
            for a in made.alternatives
        ],
        "fallback": [step.as_dict() for step in made.fallback],
        "notes": list(made.notes),
    }
