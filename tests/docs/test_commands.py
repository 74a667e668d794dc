"""Every command of the documentation runs, or says why not; `blocks.py` has the marks."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from service.cli.main import app
from tests.docs.blocks import PAGES
from tests.docs.blocks import ROOT
from tests.docs.blocks import SHELLS
from tests.docs.blocks import Block
from tests.docs.blocks import blocks
from tests.support.server import MOORAGE
from tests.support.server import environment
from tests.support.server import running
from tests.support.with_tools import fetch

RUN_HERE = [page for page in PAGES if any(block.is_run_here for block in blocks(page))]
ADDRESS = "127.0.0.1:8000"
SERVES = re.compile(r"(moorage|make) serve\b")
# a command of ours, with variables perhaps, and nothing that only a shell understands
PLAIN = re.compile(r"((?:[A-Z_]+=\S+ )*)moorage ([^|&;<>$`*\\]*)")


class Terminal:
    """What a reader of one page types, from its first block to its last, in one folder.

    A server that the page starts listens on a free port, which takes the place of 8000, and is
    ended where the page starts the next. `moorage` runs in this process, which saves importing
    torch for each command.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._set = monkeypatch.setenv
        self._server = contextlib.ExitStack()
        self._address = ADDRESS
        self._printed = ""
        tools = folder / "bin"
        tools.mkdir()
        for name, words in (("moorage", "-m service.cli"), ("python", "")):
            (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
            (tools / name).chmod(0o755)
        self._home = folder / "home"
        self._home.mkdir()
        for name in [n for n in os.environ if n.startswith("MOORAGE_")]:
            if name != "MOORAGE_CACHE":
                monkeypatch.delenv(name)
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
        monkeypatch.chdir(self._home)

    def close(self) -> None:
        self._server.close()

    def take(self, block: Block) -> None:
        """Write the block's file, run its commands, or compare its output."""
        if "file" in block.marks:
            path = self._home / block.marks["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._real(block.text))
        elif "output" in block.marks:
            for line in filter(None, block.text.splitlines()):
                found = re.search(_pattern(line), _plain(self._printed))
                assert found, f"{block.where}: {line!r} is not in\n{self._printed}"
        elif block.is_run_here and SERVES.match(block.text):
            self._serve(block)
        elif block.is_run_here:
            status = self._run(block.text)
            expected = int(block.marks.get("exit", "0"))
            assert status == expected, f"{block.where}: exit {status}\n{self._printed}"

    def _serve(self, block: Block) -> None:
        [line] = block.text.splitlines()
        self._server.close()
        folder = self._folder / f"log-{block.line}"
        folder.mkdir()
        words = shlex.split(line, comments=True)
        command = ("env", "-C", str(self._home), *_command(words, self._folder))
        server = self._server.enter_context(running(folder, command=command))
        self._address = server.wait_ready().removeprefix("http://")
        self._set("MOORAGE_BIND", self._address)

    def _real(self, text: str) -> str:
        return text.replace(ADDRESS, self._address)

    def _run(self, text: str) -> int:
        text = self._real(text)
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        plain = [PLAIN.fullmatch(line) for line in lines]
        if all(plain):
            return self._moorage([match.groups() for match in plain if match])
        extra = {name: os.environ[name] for name in ("MOORAGE_BIND",) if name in os.environ}
        done = subprocess.run(
            ("bash", "-euo", "pipefail", "-c", text),
            env=environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )
        self._printed = done.stdout
        return done.returncode

    def _moorage(self, commands: list[tuple[str, ...]]) -> int:
        """Variables and arguments of each, in turn, until one fails."""
        self._printed = ""
        for variables, arguments in commands:
            set_here = dict(pair.split("=", 1) for pair in shlex.split(variables))
            words = shlex.split(arguments, comments=True)
            result = CliRunner().invoke(app, words, env=set_here)
            self._printed += result.output
            if result.exit_code:
                return result.exit_code
        return 0


def _command(words: list[str], folder: Path) -> tuple[str, ...]:
    """What these words start; make's virtual environment is the one that tests run in."""
    if words[0] == "make":
        (folder / ".installed").touch()
        return ("make", "-C", str(ROOT), *words[1:], f"VENV={folder}")
    return (*MOORAGE, *words[2:])


def _plain(text: str) -> str:
    """With every number an N, every run of space one, and without bars."""
    text = re.sub(r"\[[#=\-. ]+\]", "[]", text)
    return re.sub(r"[ \t]+", " ", re.sub(r"\d[\d.,]*", "N", text))


def _pattern(line: str) -> str:
    return ".*".join(re.escape(_plain(part)) for part in line.strip().split("..."))


@pytest.fixture(scope="module", autouse=True)
def fetched() -> None:
    fetch("smollm2-135m")


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    # control sockets are there, and the path of a socket is short
    with tempfile.TemporaryDirectory(prefix="moorage-") as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        terminal = Terminal(tmp_path, monkeypatch)
        yield terminal
        terminal.close()


@pytest.mark.timeout(900)  # several servers and loads, on a machine that may be busy
@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page: Path, terminal: Terminal):
    for block in blocks(page):
        terminal.take(block)


# --- what is not run


SHELL_BLOCKS = [block for page in PAGES for block in blocks(page) if block.language in SHELLS]


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=lambda block: block.where)
def test_a_block_that_is_not_run_here_says_why_or_where(block: Block):
    if "run by" in block.marks:
        by = (ROOT / block.marks["run by"]).read_text(encoding="utf-8")
        # what is called: `bench` of `moorage bench URL`, --install-completion without a command
        called = [word for word in shlex.split(block.text, comments=True) if word.isalpha()][1:2]
        assert "def test_" in by
        assert all(word in by for word in called), called
    elif not block.is_run_here:
        assert len(block.marks["not run"]) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_hides_in_a_block_of_another_kind(page: Path):
    """An indented block, or one without a language, is a command that nothing tries."""
    text = page.read_text(encoding="utf-8")
    commands = r"(?:\$ )?(?:moorage|make|python3?|pip|curl|docker|kubectl|git|sudo) .*"
    fenced = "".join(block.text for block in blocks(page) if block.language in SHELLS)
    indented = re.findall(rf"^(?: {{4}}|\t)+({commands})", text, re.MULTILINE)
    assert [line for line in indented if line not in fenced] == []
    for block in blocks(page):
        if block.language in {"", "console"}:
            assert not re.search(rf"^{commands}", block.text, re.MULTILINE), block.where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_is_named_has_the_options_it_is_given(page: Path):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`moorage ([a-z][^`\n]*)`", text)
    for block in blocks(page):
        if block.language in SHELLS:
            lines = block.text.replace("\\\n", " ").splitlines()
            named += [
                m[1] for line in lines if (m := re.search(r".*\bmoorage ([a-z][^|;&>]*)", line))
            ]
    for words in named:
        command = get_command(app)
        for word in shlex.split(words, comments=True):
            if hasattr(command, "commands"):
                assert word in command.commands, f"moorage {words}"
                command = command.commands[word]
            elif word.startswith("-"):
                known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
                assert word.partition("=")[0] in known | {"--help"}, f"moorage {words}"
