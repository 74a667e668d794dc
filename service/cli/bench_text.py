"""What `moorage bench` found, as a table and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.cli import report
from service.cli import terminal
from service.cli.cleaning import clean

# what a row has of `timing.figures`
FIGURES = (
    "rate",
    "requests_rate",
    "first_ms",
    "first_p95_ms",
    "gap_ms",
    "gap_p95_ms",
    "tokens",
    "prompt_tokens",
    "seconds",
)
HEADINGS = (
    "clients",
    "answered",
    "failed",
    "tokens/s",
    "req/s",
    "first ms",
    "p95",
    "next ms",
    "p95",
)
LEGEND = (
    "tokens/s: of answers, all clients together. first: until the first token of an answer; "
    "next: between two arrivals of one answer; median and 95th percentile."
)
NOTHING = "-"


def show(document: Mapping[str, Any]) -> None:
    """On stdout; what is to be known about it on stderr."""
    about = (
        f"{clean(document['model'])} at {document['url']}",
        f"prompts of about {document['prompt_tokens']} tokens",
        f"answers of {document['output_tokens']}",
    )
    columns = terminal.columns()
    for line in terminal.flow(about, columns):
        terminal.say(line, ((r"^\S+(?= at )", "bold"),))
    report.print_table(HEADINGS, [_cells(row) for row in document["rows"]])
    for line in terminal.fold(LEGEND, columns) if columns is not None else ():
        terminal.say(line, ((".+", "bright_black"),))
    report.print_notices(_notices(document))


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(row["clients"]),
        f"{row['answered']} of {row['requests']}",
        str(row["failed"]),
        _number(row["rate"], 1),
        _number(row["requests_rate"], 2),
        _number(row["first_ms"], 0),
        _number(row["first_p95_ms"], 0),
        _number(row["gap_ms"], 1),
        _number(row["gap_p95_ms"], 1),
    )


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _notices(document: Mapping[str, Any]) -> list[str]:
    """What the figures are not."""
    rows = [row for row in document["rows"] if row["answered"]]
    found = []
    if document["interrupted"]:
        found.append("interrupted: the last line is of what was answered until then")
    if document["counted_by"] != "usage":
        found.append(
            "the server does not say how many tokens an answer has: pieces of text are counted"
        )
    for row in rows:
        mean = row["tokens"] / row["answered"]
        if mean < 0.95 * document["output_tokens"]:
            found.append(
                f"clients {row['clients']}: answers ended early, after {mean:.0f} tokens on average"
            )
    for row in document["rows"]:
        for error in row["errors"]:
            told = f"{error['count']} of {row['requests']} failed: {error['message']}"
            found.append(f"clients {row['clients']}: {told}")
    return found


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Throughput and the two waits, by the number of clients. Raises OSError."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in document["rows"] if row["answered"]]
    names = [str(row["clients"]) for row in rows]
    chart, panels = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axes, (title, *keys) in zip(
        panels,
        (
            ("output tokens a second", "rate"),
            ("ms to the first token", "first_ms", "first_p95_ms"),
            ("ms between tokens", "gap_ms", "gap_p95_ms"),
        ),
        strict=True,
    ):
        for key in keys:
            values = [float("nan") if row[key] is None else row[key] for row in rows]
            label = "95th percentile" if "p95" in key else "median"
            axes.plot(names, values, marker="o", label=label)
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("clients")
        axes.spines[["top", "right"]].set_visible(False)
        if len(keys) > 1:
            axes.legend(fontsize=8, frameon=False)
    chart.suptitle(f"{document['model']} at {document['url']}", fontsize=10)
    chart.savefig(path, dpi=150)
    pyplot.close(chart)
