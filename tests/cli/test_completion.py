"""Tab in a real bash, and what the other shells would get."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes")
CONFIG = """\
version: 1
deployment: laptop
deployments:
  laptop: {strategy_dirs: [./strategies]}
  rig: {}
  rio: {}
"""
# what bash does when Tab is pressed
PRESS_TAB = """
eval "$(_MOORAGE_COMPLETE=source_bash moorage)"
declare -F _moorage_completion > /dev/null || exit 9
complete -p moorage > /dev/null || exit 8
while IFS= read -r line; do
    IFS=, read -ra COMP_WORDS <<< "$line"
    [[ "$line" == *, ]] && COMP_WORDS+=("")
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    _moorage_completion moorage
    (IFS=" "; echo "${COMPREPLY[*]}")
done
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which `moorage` is a command that fails if anything heavy was imported."""
    check = f"heavy = [name for name in {HEAVY!r} if name in sys.modules]"
    code = (
        "import atexit, os, sys\n"
        f"def look():\n    {check}\n    if heavy: print(heavy, file=sys.stderr, flush=True)\n"
        "atexit.register(look)\n"
        "from service.cli.main import main\nmain()\n"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "run.py").write_text(code)
    command = tmp_path / "bin" / "moorage"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/bin/run.py "$@"\n')
    command.chmod(0o755)
    (tmp_path / "moorage.yaml").write_text(CONFIG)
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "my_own.py").write_text("raise SystemExit('imported')\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOORAGE_", "COV"))}
    path = os.pathsep.join((str(tmp_path / "bin"), kept["PATH"]))
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT)}


def test_bash_offers_what_there_is_and_imports_nothing_heavy(
    environment: dict[str, str], tmp_path: Path
) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    expected = {
        "moorage,pl": "plan plugins",
        "moorage,serve,--deployment,r": "rig rio",
        "moorage,plan,--strategy,": "auto-shard cpu four-bit my-own single-gpu",
        "moorage,plan,--model,s": "smollm2-135m",
        "moorage,plan,--set,max_s": "max_sequences=",
        "moorage,plan,--quantize,n": "nf4 none",
        "moorage,model,fetch,": "all-minilm-l6-v2 smollm2-135m",
        "moorage,plugins,show,my": "my-own",
    }
    done = subprocess.run(
        [bash, "--norc", "-c", PRESS_TAB],
        env=environment,
        cwd=tmp_path,
        input="".join(f"{line}\n" for line in expected),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert dict(zip(expected, done.stdout.splitlines(), strict=True)) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_answered_too(
    environment: dict[str, str], tmp_path: Path, shell: str
) -> None:
    asked = {
        "_MOORAGE_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": "moorage serve --deployment ri",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        ["moorage"], env=environment | asked, cwd=tmp_path, capture_output=True, text=True
    )
    assert "rig" in done.stdout
    assert "rio" in done.stdout
    assert done.stderr == ""


def test_a_config_with_a_mistake_offers_nothing_and_says_nothing(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "moorage.yaml").write_text("version: [")
    asked = {
        "_MOORAGE_COMPLETE": "complete_bash",
        "COMP_WORDS": "moorage\nserve\n--deployment\n",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(
        ["moorage"], env=environment | asked, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(environment: dict[str, str], tmp_path: Path, shell: str) -> None:
    done = subprocess.run(
        ["moorage"],
        env=environment | {"_MOORAGE_COMPLETE": f"source_{shell}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert f"_MOORAGE_COMPLETE=complete_{shell}" in done.stdout
