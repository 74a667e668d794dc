"""What `moorage plan` says, in the lines of a terminal or of a pipe."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from service.cli import terminal
from service.config.origin import BUILT_IN
from service.config.schema import Config

if TYPE_CHECKING:
    from service.placement.alternatives import Alternative
    from service.placement.chain import Outlook
    from service.placement.explain import DevicePlan
    from service.placement.explain import PlanReport
    from service.placement.why import Reason
    from service.testing.simulation import Simulation

GIB = 2**30
LONGEST_BAR = 34
SHORTEST_BAR = 10
STYLES: terminal.Styles = (
    (r"^FITS\.", "bold green"),
    (r"^DOES NOT FIT:", "bold red"),
    (r"^(note|why) (?= )", "bold"),
    (r"^fix:", "bold"),
    (r"--[a-z]\S* \S+", "cyan"),
)
# a run of one mark in the bar, and what it means in the line below
TABLE_STYLES: terminal.Styles = (
    (r"#+(?=[#=.-]*\])|# weights", "blue"),
    (r"=+(?=[#=.-]*\])|= KV cache", "green"),
    (r"-+(?=[#=.-]*\])|- overhead", "yellow"),
    (r"\.+(?=[#=.-]*\])|\. free", "bright_black"),
    (r"(?<=  )-\d[\d.]*(?=  \[)", "bold red"),
)
HEADINGS: terminal.Styles = ((".+", "bold"),)


def show(
    made: "PlanReport",
    loaded: Config,
    reason: "Reason | None",
    simulation: "Simulation | None",
) -> None:
    """The whole report on stdout."""
    columns = terminal.columns()
    for line in head(made, columns):
        terminal.say(line, ((r"(?<=deployment )\S+", "bold"),))
    if made.placement is None:
        _say(refusal(made, loaded), columns)
        if made.error is not None and made.alternatives:
            heading, *lines = choices(made.alternatives, columns)
            terminal.say(heading, HEADINGS)
            for line in lines:
                terminal.say(line, STYLES)
    else:
        heading, *lines = table(made.devices, terminal.table_columns())
        terminal.say(heading, HEADINGS)
        for line in lines:
            terminal.say(line, TABLE_STYLES)
        _say(verdict(made), columns)
    _say(because(reason), columns)
    if simulation is not None:
        from service.testing.simulation import sentences

        _say([(line, 2) for line in sentences(simulation, made.placement)], columns)


def _say(lines: Sequence[tuple[str, int]], columns: int | None) -> None:
    """Lines, each with how far it hangs in where it is folded."""
    for text, hang in lines:
        for line in terminal.fold(text, columns, hang):
            terminal.say(line, STYLES)


def head(made: "PlanReport", columns: int | None) -> list[str]:
    """What is planned."""
    config, placement = made.config, made.placement
    parts = [f"deployment {config.deployment}", config.model_id]
    if placement and placement.parameters:
        parts.append(_parameters(placement.parameters))
    parts += [f"strategy {config.strategy}", f"quantize {config.quantize}"]
    return terminal.flow(parts, columns)


def verdict(made: "PlanReport") -> list[tuple[str, int]]:
    """That it fits, how much room is left, and what else is to be said."""
    asked = made.placement.kv_tokens if made.placement else 0
    room = f"Room for {made.room_tokens:,} tokens of KV in all; you asked for {asked:,}."
    fits = f"FITS. {room if asked else 'No KV cache is kept.'}"
    return [(fits, 6), *((f"note  {note}", 6) for note in made.notes)]


def refusal(made: "PlanReport", loaded: Config) -> list[tuple[str, int]]:
    """Why it does not fit, and what else was tried."""
    if made.error is None:
        return []
    lines = [(f"DOES NOT FIT: {made.error.message}", 2)]
    lines += [(f"  {note}", 2) for note in made.notes]
    if made.config.on_no_fit == "refuse":
        origin = loaded.origins.get("on_no_fit", BUILT_IN)
        lines.append((f"  Refused because on_no_fit: refuse ({origin}).", 2))
    lines += [(line, 5) for line in in_order(made.fallback)]
    if not made.alternatives:
        hint = made.error.hint
        lines.append((f"fix: {hint}" if hint else "nothing smaller was found", 5))
    return lines


def because(reason: "Reason | None") -> list[tuple[str, int]]:
    """Why one module is where it is, and what would move it."""
    if reason is None:
        return []
    lines = [(f"why   {'; '.join(reason.sentences)}.", 6)]
    lines += [(f"      with {flag} it would be on {device}", 8) for flag, device in reason.moves]
    if not reason.moves:
        lines.append(("      no single setting that was tried would move it", 8))
    return lines


def in_order(fallback: "Sequence[Outlook]") -> list[str]:
    """What each step of `fallback` would plan, a line each, under a heading; nothing if none."""
    lines = [f"{number:>3}  {step.line()}" for number, step in enumerate(fallback, 1)]
    return ["then, as fallback says", *lines] if lines else []


def choices(alternatives: "Sequence[Alternative]", columns: int | None) -> list[str]:
    """What would fit, numbered and aligned; columns: None for a pipe."""
    left = ["+".join(_gib(size) for size in found.left) for found in alternatives]
    first = max(len("what would fit"), *(len(found.what) + 5 for found in alternatives))
    last = max(len("left GiB"), *map(len, left))
    middle = len(f"  {'':>10}  {'':>{last}}   ")
    longest = max(len(found.flag) for found in alternatives)
    below = columns is not None and first + middle + longest > columns
    if below and columns is not None:
        first = min(first, max(20, columns - middle))
    try_ = "" if below else "   try"
    lines = [f"{'what would fit'.ljust(first)}  {'weights':>10}  {'left GiB':>{last}}{try_}"]
    for number, (found, room) in enumerate(zip(alternatives, left, strict=True), 1):
        what, *more = terminal.fold(f"{number:>3}  {found.what}", first, 5)
        figures = f"{what.ljust(first)}  {_gib(found.weights):>6} GiB  {room:>{last}}"
        lines += [figures if below else f"{figures}   {found.flag}", *more]
        if below:
            lines += terminal.fold(f"     try {found.flag}", columns, 9)
    return lines


def table(devices: "Sequence[DevicePlan]", columns: int) -> list[str]:
    """The devices as aligned lines, sizes in GiB, with a bar and the modules at the end.

    None is wider than `columns`, from 60 on: the bar gets shorter; if that is not enough the
    modules go below, and the device's name is cut.
    """
    heads = ("total", "free", "weights", "KV", "overhead", "left")
    rows = [_sizes(device) for device in devices]
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    figures = sum(width + 2 for width in widths)
    names = [f"{device.id} {device.name}".rstrip() for device in devices]
    most = columns - figures - len("  []") - SHORTEST_BAR
    first = max(len("device"), min(most, max(map(len, names))))

    def numbers(name: str, cells: tuple[str, ...]) -> str:
        sized = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join((terminal.shorten(name, first).ljust(first), *sized))

    lines = [numbers("device", heads)]
    modules = [", ".join(map(_module, device.modules)) for device in devices]
    room = columns - len(lines[0]) - len("  []")
    beside = room - 2 - max(map(len, modules))
    bar = max(SHORTEST_BAR, min(LONGEST_BAR, beside if beside >= SHORTEST_BAR else room))
    for name, row, device, words in zip(names, rows, devices, modules, strict=True):
        text = f"{numbers(name, row)}  [{_bar(device, bar)}]"
        if words and len(text) + 2 + len(words) > columns:
            lines.append(text)
            lines += terminal.fold(f"{' ' * first}  {words}", columns, first + 2)
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
