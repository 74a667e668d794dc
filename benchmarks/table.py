"""Results as Markdown tables: `python -m benchmarks table [FILE ...]`, by default all there are."""

import argparse
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks import results

OURS = "moorage"
# key of a row, what it is called, digits
COLUMNS = {
    "rate": ("output tokens a second", 0),
    "first_ms": ("time to first token, ms, median", 0),
    "gap_p95_ms": ("between tokens, ms, 95 %", 0),
    "step_ms": ("one step with all streams decoding, ms", 1),
}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of one result of `engine` or `serve`, and what they were measured on."""
    if not result["rows"]:
        return "Nothing was measured.\n"
    parts = [rates(result)]
    parts += [figure(result, key) for key in ("first_ms", "gap_p95_ms", "step_ms")]
    if result.get("latency"):
        parts.append(latency(result["latency"]))
    parts += [f"{name}: not measured, {why}." for name, why in result["absent"].items()]
    return "\n".join([*parts, measured_on(result)])


def rates(result: Mapping[str, Any]) -> str:
    """Tokens a second, median (lowest to highest of the runs), and ours divided by each."""
    streams, engines = _axes(result)
    head = ["output tokens a second", *(_streams(count) for count in streams)]
    body = []
    for engine in engines:
        cells = [engine]
        for count in streams:
            own = figures.runs_of(result["rows"], engine, count, "rate")
            if not own:
                cells.append("")
                continue
            told = figures.spread(own)
            cell = f"{told['median']:.0f} ({told['low']:.0f}-{told['high']:.0f})"
            ours = figures.runs_of(result["rows"], OURS, count, "rate")
            if ours and engine != OURS:
                cell += f", {figures.ratio(ours, own)['median']:.2f}x"
            cells.append(cell)
        body.append(cells)
    note = f"Median (lowest-highest) of the runs; x is {OURS} divided by it, run by run.\n"
    return f"{_table(head, body)}\n{note}"


def figure(result: Mapping[str, Any], key: str) -> str:
    """Medians of one other figure."""
    streams, engines = _axes(result)
    name, digits = COLUMNS[key]
    body = []
    for engine in engines:
        cells = [engine]
        for count in streams:
            own = figures.runs_of(result["rows"], engine, count, key)
            cells.append(f"{figures.spread(own)['median']:.{digits}f}" if own else "")
        body.append(cells)
    return _table([name, *(_streams(count) for count in streams)], body)


def latency(found: Mapping[str, Any]) -> str:
    """What a new prompt waits beside running streams, and what a long one costs them."""
    rows = [
        [f"{what}, ms", f"{found[key]:.0f}" if found[key] is not None else ""]
        for key, what in (
            ("first_alone_ms", "first token of a 256-token prompt, alone"),
            ("first_loaded_ms", f"the same beside {found['streams']} streams"),
            ("first_allowed_ms", "twice alone plus one step"),
            ("step_idle_ms", "one step of those streams"),
            ("gap_idle_p95_ms", "between their tokens, 95 %"),
            (
                "gap_long_prompt_p95_ms",
                f"the same while a {found['long_prompt']:,}-token prompt is computed",
            ),
            ("long_prompt_first_ms", "first token of that prompt"),
        )
    ]
    return _table([f"{found['streams']} streams", ""], rows)


def measured_on(result: Mapping[str, Any]) -> str:
    """One paragraph: machine, versions, settings, date."""
    machine, asked = result["machine"], result["settings"]
    versions: dict[str, str] = {}
    for detail in result["engines"].values():
        for package in ("moorage", "torch", "transformers", "openvino-genai"):
            if package in detail:
                versions[package] = detail[package]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    prompt, answer = asked["prompt"], asked["answer"]
    return (
        f"{asked['model']}, prompts of {prompt[0]} to {prompt[1]} tokens, answers of {answer[0]} "
        f"to {answer[1]}, {asked['runs']} runs in turns, {asked['threads']} compute thread(s) "
        f"each; {machine['cpu']}, {machine['cores']} cores; {packages}; "
        f"{result['date'][:10]}, commit {result['commit']}.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print them. Returns the exit status: 1 if there are none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks table", description=__doc__)
    there = [results.FOLDER / f"{name}.json" for name in ("engine", "serve")]
    parser.add_argument("files", nargs="*", type=Path, default=[p for p in there if p.is_file()])
    options = parser.parse_args(arguments)
    if not options.files:
        sys.stderr.write(f"there are no results in {results.FOLDER}; measure with --json\n")
        return 1
    sys.stdout.write("\n".join(markdown(results.read(path)) for path in options.files))
    return 0


def _axes(result: Mapping[str, Any]) -> tuple[list[int], list[str]]:
    """Numbers of streams and engines, both as far as there are rows."""
    rows = result["rows"]
    streams = sorted({row["streams"] for row in rows})
    return streams, list(dict.fromkeys([*result["engines"], *(row["engine"] for row in rows)]))


def _streams(count: int) -> str:
    return f"{count} stream" if count == 1 else f"{count} streams"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
