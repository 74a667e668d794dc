"""Colours, widths and bars where a person looks; plain whole lines where a program does."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from service.cli import doctor
from service.cli import plan_text
from service.cli import report
from service.cli import terminal
from service.cli.doctor import Finding
from service.cli.main import app
from service.placement.alternatives import Alternative
from service.placement.explain import DevicePlan
from service.placement.plan import DeviceMemory
from tests.cli.conftest import Run
from tests.cli.conftest import as_json
from tests.cli.test_main import moorage
from tests.support.terminal import ESCAPE
from tests.support.terminal import Terminal
from tests.support.terminal import on_terminal

GIB = 2**30
WIDTHS = [80, 120]


def card(index: int, name: str = "NVIDIA GeForce RTX 4090 Laptop GPU", **sizes: int) -> DevicePlan:
    planned = DeviceMemory(sizes.get("weights", 18 * GIB), 2 * GIB, GIB)
    modules = (("embed_tokens", 1), (f"layers.{index}-{index + 9}", 10), ("a." + "long" * 30, 1))
    return DevicePlan(f"cuda:{index}", name, 24 * GIB, 23 * GIB, planned, modules)


# --- widths


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("count", [1, 16])
def test_a_plan_of_many_devices_with_long_names_keeps_its_columns(columns: int, count: int) -> None:
    devices = [card(index) for index in range(count)]
    devices[-1] = card(count - 1, weights=200 * GIB)
    lines = plan_text.table(devices, columns)
    assert max(map(len, lines)) <= columns
    rows = [line for line in lines if "[" in line]
    assert len(rows) == count
    assert all(f"cuda:{index} " in row for index, row in enumerate(rows))
    for mark in "[]":
        assert len({row.index(mark) for row in rows}) == 1, mark
    heading = lines[0]
    for name in ("total", "free", "weights", "KV", "overhead", "left"):
        end = heading.index(name) + len(name)
        assert all(row[end - 1].isdigit() and row[end] == " " for row in rows), name
    below = [line for line in lines[1:-1] if "[" not in line]
    indent = len(below[0]) - len(below[0].lstrip())
    assert all(line.startswith(" " * indent) for line in below)


@pytest.mark.parametrize("columns", WIDTHS)
def test_what_would_fit_is_never_wider_than_the_terminal(columns: int) -> None:
    found = Alternative(
        "the rest in RAM and on disk, slowly, and some more words that say how",
        "--strategy auto-shard --set on_no_fit=offload-disk --set max_context=2048",
        131 * GIB,
        tuple([GIB] * 4),
    )
    lines = plan_text.choices((found, replace(found, what="short", flag="--x")), columns)
    assert max(map(len, lines)) <= columns
    assert "--set max_context=2048" in " ".join(" ".join(lines).split())
    assert len({line.index(" GiB") for line in lines[1:] if " GiB" in line}) == 1


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("level", ["ok", "warn", "error"])
def test_a_finding_is_folded_below_its_text_and_a_pipe_gets_one_line(
    columns: int, level: str
) -> None:
    words = " ".join(["something that is so"] * 9)
    finding = Finding(level, words, "do this " * 20 + "/a/path" * 30)  # type: ignore[arg-type]
    lines = doctor.lines(finding, columns)
    assert max(map(len, lines)) <= columns
    assert all(line.startswith(" " * 7) for line in lines[1:])
    assert sum("fix: " in line for line in lines) == 1
    (whole,) = doctor.lines(finding, None)
    assert words in whole


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_table_folds_its_last_column_only(columns: int) -> None:
    rows = [["one", "7", "word " * 40], ["longer-name", "1,234", "short"]]
    lines = report.table_lines(("NAME", "SIZE", "SUMMARY"), rows, columns)
    assert max(map(len, lines)) <= columns
    at = lines[0].index("SUMMARY")
    assert lines[1][at:].startswith("word")
    assert all(line[:at].strip() == "" for line in lines[2:-1])
    assert lines[1][: at - 2].endswith("    7"), "numbers stand to the right"
    assert len(report.table_lines(("NAME", "SIZE", "SUMMARY"), rows, None)) == 3


def test_a_word_that_is_wider_than_the_line_is_cut_and_nothing_is_lost() -> None:
    text = "see /" + "folder/" * 30 + "file"
    lines = terminal.fold(text, 40, 4)
    assert max(map(len, lines)) <= 40
    assert "".join(line.strip() for line in lines).replace(" ", "") == text.replace(" ", "")


# --- colours


def test_every_command_has_json_and_no_color() -> None:
    def commands(group: object, path: str) -> Iterator[tuple[str, set[str]]]:
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            if hasattr(command, "commands"):
                yield from commands(command, f"{path} {name}")
            else:
                yield f"{path} {name}", {o for param in command.params for o in param.opts}

    found = dict(commands(typer.main.get_command(app), "moorage"))
    assert "moorage model fetch" in found
    for name, options in found.items():
        assert {"--json", "--no-color"} <= options, name


@pytest.mark.parametrize(
    ("words", "env", "colours"),
    [
        ((), {}, True),
        (("--no-color",), {}, False),
        ((), {"NO_COLOR": "1"}, False),
        ((), {"NO_COLOR": ""}, True),
        ((), {"TERM": "dumb"}, False),
        (("--no-color", "--json"), {}, False),
        (("--json",), {}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    words: tuple[str, ...], env: dict[str, str], colours: bool, tmp_path: Path
) -> None:
    with on_terminal("model", "list", *words, cwd=tmp_path, env=env) as shown:
        assert shown.wait() == 0
    assert ("\x1b[" in shown.raw) == colours
    assert "--json" in words or max(map(len, shown.screen)) <= 80


def test_in_a_pipe_there_is_none_and_lines_are_whole(tmp_path: Path) -> None:
    done = moorage("model", "list", cwd=tmp_path)
    assert "\x1b" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) > 80
    assert done.stderr == ""


def test_a_pipe_that_is_closed_is_no_error_of_ours(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    root = Path(__file__).parents[2]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOORAGE_", "COV"))}
    for words in (("config", "show"), ("model", "list"), ("model", "list", "--json")):
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", *words],
            env=kept | {"PYTHONPATH": str(root)},
            cwd=tmp_path,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.stderr == "", words
    os.close(writing)


# --- commands on a terminal


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Terminal]:
    """A server that loads on a terminal, and is ready."""
    folder = tmp_path_factory.mktemp("shown")
    words = ("serve", "--model", str(tiny), "--set", "max_context=2048")
    env = {"MOORAGE_BIND": "127.0.0.1:0", "OMP_NUM_THREADS": "1"}
    with on_terminal(*words, columns=100, cwd=folder, env=env) as running:
        running.wait_for("Moorage is ready")
        running.wait_for("\n", after=running.raw.index("Moorage is ready"))
        yield running


def url_of(shown: Terminal) -> str:
    found = re.search(r"ready: (http://\S+)", shown.raw)
    assert found is not None
    return found[1]


def test_a_load_shows_a_bar_that_is_gone_when_it_is_ready(shown: Terminal) -> None:
    assert re.search(r"━ +\d+% \d:\d\d  loading ", ESCAPE.sub("", shown.raw))
    lines = [line for line in shown.screen if line]
    assert not any("━" in line for line in lines), "no bar is left on the screen"
    log = [line for line in lines if re.match(r"\[\d{4}-\d\d-\d\d .*\] \[\w+\] ", line)]
    assert any("Listening at: " in line for line in log)
    assert any("Moorage is ready: " in line for line in log)
    assert not any(re.search(r"tiny: \d+ %", line) for line in lines), "the bar says it"
    assert "\x1b[?25l" not in shown.raw, "the cursor stays"


def test_a_load_that_fails_leaves_its_error_and_no_bar(tmp_path: Path) -> None:
    env = {"MOORAGE_BIND": "127.0.0.1:0"}
    with on_terminal("serve", "--model", "./nowhere", cwd=tmp_path, env=env) as failed:
        assert failed.wait() == 6
    lines = [line for line in failed.screen if line]
    assert "no such folder" in lines[-1]
    assert not any("━" in line for line in lines)


def test_a_real_server_is_measured_and_talked_to(shown: Terminal, run: Run) -> None:
    url = url_of(shown)
    small = ("--clients", "1,2", "--requests", "2", "--prompt", "64", "--output", "4")
    made = as_json(run("bench", url, *small, "--json"))
    assert made["model"] == "tiny"
    for row in made["rows"]:
        assert (row["answered"], row["failed"], row["tokens"]) == (2, 0, 8)
        assert abs(row["prompt_tokens"] / 2 - 64) < 16
        assert 0 < row["first_ms"] <= row["first_p95_ms"]
    from typer.testing import CliRunner

    words = ["chat", url, "--json"]
    answered = as_json(CliRunner().invoke(app, words, input="hello"))
    assert answered["usage"]["completion_tokens"] > 0
    assert answered["finish_reason"] in ("stop", "length")


def test_plan_and_doctor_fit_a_terminal_of_80_columns(tiny: Path, tmp_path: Path) -> None:
    env = {"MOORAGE_CACHE": str(tmp_path / "cache"), "MOORAGE_BIND": "127.0.0.1:0"}
    for words in (
        ("plan", "--model", str(tiny), "--hardware", "ram=4GiB", "--set", "max_context=64"),
        ("doctor", "--set", f"model={tiny}"),
    ):
        # libraries say things on stderr
        with on_terminal(*words, cwd=tmp_path, env=env, errors=tmp_path / "errors") as seen:
            assert seen.wait() == 0, (tmp_path / "errors").read_text()
        assert max(map(len, seen.screen)) <= 80, seen.screen
        assert "\x1b[1;32m" in seen.raw


def test_numbers_in_the_last_column_stay_in_their_row() -> None:
    rows = [["a" * 30, "1"], ["b", "22,222"]]
    lines = report.table_lines(("NAME", "SIZE"), rows, 32)
    assert [line[32:] for line in lines] == ["  SIZE", "     1", "22,222"]
