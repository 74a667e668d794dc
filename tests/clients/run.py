"""Official clients, unmodified, against `moorage serve` with the real SmolLM2.

python -m tests.clients.run [NAME ...]     all of CLIENTS, or some; exit status 1 if one failed

Each client has a script, use_NAME.py, and exact versions, requirements-NAME.txt, installed into an
environment of its own below the cache folder. A script writes a line for each thing it has shown
and ends with an error at the first that fails. Needs the network when an environment is first made,
and Node 20 or newer with npm for openai-node.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.server import running
from tests.support.with_tools import CACHE
from tests.support.with_tools import copy_with_tools
from tests.support.with_tools import fetch

HERE = Path(__file__).parent
ENVIRONMENTS = CACHE / "clients"
CLIENTS = ("openai", "openai-node", "langchain", "litellm", "llm", "lm-eval", "guidellm")
NODE = {"openai-node"}
ENCODER = "all-minilm-l6-v2"
KEY = "sk-clients"
SCRIPT_TIMEOUT_S = 1800
# float32, so that lm-eval's sums may be compared with those of transformers
CONFIG = """\
version: 1
deployments:
  clients:
    model: ./smollm2-135m
    dtype: float32
"""


@dataclass(frozen=True)
class Result:
    name: str
    shown: Sequence[str]
    error: str | None
    seconds: float


def script(name: str) -> Path:
    return HERE / f"use_{name.replace('-', '_')}{'.mjs' if name in NODE else '.py'}"


def requirements(name: str) -> Path:
    return HERE / ("package.json" if name in NODE else f"requirements-{name}.txt")


def version(name: str) -> str:
    """The pinned version of the client itself: the first one of its requirements."""
    text = requirements(name).read_text()
    found = re.search(r'"openai": "([\d.]+)"' if name in NODE else r"^[\w-]+==([\d.]+)", text)
    if not found:
        raise ValueError(f"{requirements(name)} does not begin with an exact version")
    return found[1]


def install(name: str) -> list[str]:
    """The command that runs the client's script; its environment is made if it is not there."""
    folder, wanted = ENVIRONMENTS / name, requirements(name)
    made_from = folder / "made-from"
    if not made_from.exists() or made_from.read_text() != wanted.read_text():
        sys.stderr.write(f"{name}: installing into {folder}\n")
        shutil.rmtree(folder, ignore_errors=True)
        if name in NODE:
            folder.mkdir(parents=True)
            shutil.copy(wanted, folder)
            done = captured(["npm", "install", "--no-audit", "--no-fund"], folder)
        else:
            captured([sys.executable, "-m", "venv", str(folder)], HERE)
            pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "-r"]
            done = captured([*pip, str(wanted)], HERE)
        if done.returncode:
            raise RuntimeError(f"cannot install {wanted.name}:\n{done.stderr[-3000:]}")
        made_from.write_text(wanted.read_text())
    if name in NODE:  # which looks for packages beside the script
        shutil.copy(script(name), folder)
        return ["node", str(folder / script(name).name)]
    return [str(folder / "bin/python"), str(script(name))]


def captured(
    command: Sequence[str], folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run it to its end. Moorage's own packages are not on the client's path."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command,
        cwd=folder,
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=SCRIPT_TIMEOUT_S,
    )


def run(name: str, url: str, embeddings_url: str, model: Path, folder: Path) -> Result:
    """Run a client's script against the servers at these addresses, in `folder`."""
    begun = time.monotonic()
    try:
        done = captured(
            install(name),
            folder,
            OPENAI_BASE_URL=f"{url}/v1",
            OPENAI_API_KEY=KEY,
            EMBEDDINGS_BASE_URL=f"{embeddings_url}/v1",
            MODEL_FOLDER=str(model),
            MOORAGE_PYTHON=sys.executable,
            TMPDIR=str(folder),
            # nothing is fetched while they run
            HF_HUB_OFFLINE="1",
            HF_HOME=str(folder / "huggingface"),
            LITELLM_LOCAL_MODEL_COST_MAP="True",
        )
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return Result(name, (), str(error), time.monotonic() - begun)
    shown = done.stdout.splitlines()
    error = None
    if done.returncode:
        error = f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    elif not shown:
        error = "its script showed nothing"
    return Result(name, shown, error, time.monotonic() - begun)


def table(results: Sequence[Result]) -> str:
    rows = ["| client | version | what ran | result | seconds |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        end = "FAILED" if result.error else "ok"
        cells = [result.name, version(result.name), "; ".join(result.shown), end]
        rows.append(f"| {' | '.join(cells)} | {result.seconds:.0f} |")
    return "\n".join(rows)


def main(names: Sequence[str]) -> int:
    """Run the named clients, or all. Returns the exit status: 2 for a name that there is not."""
    unknown = set(names) - set(CLIENTS)
    if unknown:
        sys.stderr.write(
            f"no client {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}\n"
        )
        return 2
    fetch("smollm2-135m")
    fetch(ENCODER)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = copy_with_tools(folder / "smollm2-135m")
        (folder / "moorage.yaml").write_text(CONFIG)
        (folder / "encoder").mkdir()
        with (
            running(folder, MOORAGE_API_KEYS=KEY) as server,
            running(folder / "encoder", "--model", ENCODER, MOORAGE_API_KEYS=KEY) as encoder,
        ):
            urls = server.wait_ready(), encoder.wait_ready()
            for name in names or CLIENTS:
                results.append(run(name, *urls, model, folder))
                sys.stderr.write(f"{name}: {results[-1].error or 'ok'}\n")
    sys.stdout.write(f"{table(results)}\n")
    return int(any(result.error for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
