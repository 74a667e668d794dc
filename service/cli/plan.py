"""`moorage plan`: where the model would go, what fits, and what would."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

import typer

from service.cli import options
from service.cli import report
from service.config import reading
from service.config.origin import BUILT_IN
from service.config.schema import Config
from service.errors import StartupError

if TYPE_CHECKING:
    from service.placement.alternatives import Alternative
    from service.placement.chain import Outlook
    from service.placement.explain import DevicePlan
    from service.placement.explain import PlanReport
    from service.placement.hardware import Hardware
    from service.placement.why import Reason
    from service.testing.simulation import Simulation

GIB = 2**30
LONGEST_BAR = 34
SHORTEST_BAR = 10


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
        _print(made, loaded)
        _print_reason(reason)
        _print_simulation(made, simulation)
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
        for line in in_order(outlook(others, located, machine)):
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


def _print_simulation(made: "PlanReport", simulation: "Simulation | None") -> None:
    if simulation is None:
        return
    from service.testing.simulation import sentences

    for line in sentences(simulation, made.placement):
        typer.echo(line)


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


def _print_reason(reason: "Reason | None") -> None:
    if reason is None:
        return
    typer.echo(f"why   {'; '.join(reason.sentences)}.")
    for flag, device in reason.moves:
        typer.echo(f"      with {flag} it would be on {device}")
    if not reason.moves:
        typer.echo("      no single setting that was tried would move it")


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


def _print(made: "PlanReport", loaded: Config) -> None:
    config, placement = made.config, made.placement
    head = [f"deployment {config.deployment}", config.model_id]
    if placement and placement.parameters:
        head.append(_parameters(placement.parameters))
    head += [f"strategy {config.strategy}", f"quantize {config.quantize}"]
    typer.echo("   ".join(head))
    if placement is None:
        _print_refusal(made, loaded)
        return
    columns, _ = shutil.get_terminal_size((120, 24))
    for line in table(made.devices, columns):
        typer.echo(line)
    asked = placement.kv_tokens
    room = f"Room for {made.room_tokens:,} tokens of KV in all; you asked for {asked:,}."
    typer.echo(f"FITS. {room if asked else 'No KV cache is kept.'}")
    for note in made.notes:
        typer.echo(f"note  {note}")


def _print_refusal(made: "PlanReport", loaded: Config) -> None:
    if made.error is None:
        return
    typer.echo(f"DOES NOT FIT: {made.error.message}")
    for note in made.notes:
        typer.echo(f"  {note}")
    if made.config.on_no_fit == "refuse":
        origin = loaded.origins.get("on_no_fit", BUILT_IN)
        typer.echo(f"  Refused because on_no_fit: refuse ({origin}).")
    for line in in_order(made.fallback):
        typer.echo(line)
    if not made.alternatives:
        typer.echo(f"fix: {made.error.hint}" if made.error.hint else "nothing smaller was found")
        return
    typer.echo("\n".join(choices(made.alternatives)))


def in_order(fallback: "Sequence[Outlook]") -> list[str]:
    """What each step of `fallback` would plan, a line each, under a heading; nothing if none."""
    lines = [f"{number:>3}  {step.line()}" for number, step in enumerate(fallback, 1)]
    return ["then, as fallback says", *lines] if lines else []


def choices(alternatives: "tuple[Alternative, ...]") -> list[str]:
    """What would fit, numbered and aligned."""
    left = ["+".join(_gib(size) for size in found.left) for found in alternatives]
    first = max(len("what would fit"), *(len(found.what) + 5 for found in alternatives))
    last = max(len("left GiB"), *map(len, left))
    lines = [f"{'what would fit'.ljust(first)}  {'weights':>10}  {'left GiB':>{last}}   try"]
    for number, (found, room) in enumerate(zip(alternatives, left, strict=True), 1):
        what = f"{number:>3}  {found.what}".ljust(first)
        lines.append(f"{what}  {_gib(found.weights):>6} GiB  {room:>{last}}   {found.flag}")
    return lines


def table(devices: "tuple[DevicePlan, ...]", columns: int) -> list[str]:
    """The devices as aligned lines, sizes in GiB, with a bar and the modules at the end.

    Fits into `columns` where it can: the bar gets shorter, and if that is not enough the modules
    go below.
    """
    names = [f"{device.id} {device.name}".rstrip() for device in devices]
    heads = ("total", "free", "weights", "KV", "overhead", "left")
    rows = [_sizes(device) for device in devices]
    first = max(len("device"), *map(len, names))
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]

    def numbers(name: str, cells: tuple[str, ...]) -> str:
        sized = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join((name.ljust(first), *sized))

    lines = [numbers("device", heads)]
    modules = [", ".join(map(_module, device.modules)) for device in devices]
    room = columns - len(lines[0]) - len("  []")
    beside = room - 2 - max(map(len, modules))
    bar = max(SHORTEST_BAR, min(LONGEST_BAR, beside if beside >= SHORTEST_BAR else room))
    for device, name, row, words in zip(devices, names, rows, modules, strict=True):
        text = f"{numbers(name, row)}  [{_bar(device, bar)}]"
        if words and len(text) + 2 + len(words) > columns:
            lines += [text, f"{' ' * first}  {words}"]
        else:
            lines.append(f"{text}  {words}".rstrip())
    lines.append(" " * first + "  # weights  = KV cache  - overhead  . free        GiB")
    return lines


def _module(named: tuple[str, int]) -> str:
    """("layers.0-39", 40) -> "layers 0-39"."""
    name, count = named
    return name.replace(".", " ") if count > 1 else name


def _sizes(device: "DevicePlan") -> tuple[str, ...]:
    planned = device.planned
    sizes = (device.total, device.free, planned.weights, planned.kv, planned.overhead, device.left)
    return tuple(_gib(size) for size in sizes)


def _bar(device: "DevicePlan", length: int) -> str:
    """Shares of the free bytes; what is there at all gets at least one mark."""
    planned = device.planned
    text = ""
    for mark, size in (("#", planned.weights), ("=", planned.kv), ("-", planned.overhead)):
        count = round(length * size / device.free) if device.free > 0 else 0
        text += mark * max(count, 1 if size else 0)
    return text[:length].ljust(length, ".")


def _gib(size: int) -> str:
    """GiB with one decimal; a small model's sizes with two."""
    return f"{size / GIB:.1f}" if not 0 < abs(size) < GIB else f"{size / GIB:.2f}"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.1f} B parameters" if count >= 1e9 else f"{count / 1e6:.0f} M parameters"
