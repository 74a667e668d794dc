"""Results as pictures: `python -m benchmarks plot [FILE ...]` writes a PNG beside each.

Needs matplotlib: `pip install 'moorage[bench]'`.
"""

import argparse
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks import results

TITLES = {"engine": "In process", "serve": "Over HTTP"}


def bars(result: Mapping[str, Any]) -> tuple[list[int], dict[str, list[dict[str, float] | None]]]:
    """Numbers of streams, and engine -> `figures.spread` of its rate at each, or None."""
    rows = result["rows"]
    streams = sorted({row["streams"] for row in rows})
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    found: dict[str, list[dict[str, float] | None]] = {}
    for engine in engines:
        runs = [figures.runs_of(rows, engine, count, "rate") for count in streams]
        found[engine] = [figures.spread(own) if own else None for own in runs]
    return streams, found


def draw(result: Mapping[str, Any], path: Path) -> None:
    """One group of bars a number of streams; lines show the lowest and the highest run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    streams, found = bars(result)
    chart, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / max(1, len(found))
    for number, (engine, spreads) in enumerate(found.items()):
        there = [(at, told) for at, told in enumerate(spreads) if told is not None]
        heights = [told["median"] for _, told in there]
        axes.bar(
            [at + (number - (len(found) - 1) / 2) * width for at, _ in there],
            heights,
            width,
            label=engine,
            yerr=[
                [told["median"] - told["low"] for _, told in there],
                [told["high"] - told["median"] for _, told in there],
            ],
            error_kw={"linewidth": 1},
        )
    axes.set_xticks(range(len(streams)), [str(count) for count in streams])
    axes.set_xlabel("streams at once")
    axes.set_ylabel("output tokens a second")
    asked, machine = result["settings"], result["machine"]
    title = TITLES.get(result["benchmark"], result["benchmark"])
    axes.set_title(
        f"{title}, {asked['model']}, {machine['cpu']}, {asked['threads']} compute thread(s)",
        fontsize=10,
    )
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    chart.savefig(path, dpi=150)
    pyplot.close(chart)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw them. Returns the exit status: 1 if there are none, 2 without matplotlib."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__)
    there = [results.FOLDER / f"{name}.json" for name in TITLES]
    parser.add_argument("files", nargs="*", type=Path, default=[p for p in there if p.is_file()])
    options = parser.parse_args(arguments)
    if not options.files:
        sys.stderr.write(f"there are no results in {results.FOLDER}; measure with --json\n")
        return 1
    for path in options.files:
        target = path.with_suffix(".png")
        try:
            draw(results.read(path), target)
        except ModuleNotFoundError as error:
            sys.stderr.write(f"{error}; pip install 'moorage[bench]'\n")
            return 2
        sys.stdout.write(f"{target}\n")
    return 0
