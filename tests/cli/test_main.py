"""The command as a process: light to start, exit statuses, no colours in a pipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service import __version__

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes", "safetensors")


def moorage(*words: str, cwd: Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; with `code` as what to run after it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MOORAGE_", "COV"))}
    env |= {"PYTHONPATH": str(ROOT), "MOORAGE_CACHE": str(cwd / "cache"), "COLUMNS": "100"}
    for name in ("DEVICE_MAP", "QUANTIZE"):
        env.pop(name, None)
    start = ["-m", "service.cli"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *words], env=env, cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("plan", "--help"),
        ("certify", "--help"),
        ("bench", "--help"),
        ("chat", "--help"),
        ("plugins", "list"),
        ("plugins", "show", "single-gpu"),
        ("plugins", "check", "--help"),
        ("config", "show"),
        ("model", "list"),
    ],
)
def test_light_commands_import_nothing_heavy(words: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom service.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr)"
    )
    done = moorage(*words, cwd=tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.stdout


def test_help_in_a_pipe_has_no_colours(tmp_path: Path) -> None:
    done = moorage("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    for command in ("serve", "plan", "certify", "doctor", "plugins", "config", "model"):
        assert command in done.stdout


def test_the_version_is_printed(tmp_path: Path) -> None:
    assert moorage("--version", cwd=tmp_path).stdout == f"moorage {__version__}\n"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("plugins", "list"), 0),
        (("nonsense",), 2),
        (("plan", "--hardware", "many"), 2),
        (("plan", "--set", "strategey=cpu"), 3),
        (("plan", "--strategy", "nobody"), 3),
        (("plan", "--strategy", "single-gpu", "--hardware", "ram=1GiB"), 4),
        (("plan", "--model", "./nowhere"), 6),
        (("model", "fetch", "nothing"), 6),
    ],
)
def test_exit_statuses(words: tuple[str, ...], status: int, tmp_path: Path) -> None:
    done = moorage(*words, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
