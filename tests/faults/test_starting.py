"""Plugins, folders and disks that cannot be served from: never ready, one line with the reason."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployment.faults import FAULTS
from tests.deployment.strategies import hook
from tests.deployment.strategies import load_then
from tests.deployment.strategies import write
from tests.deployment.test_faults import place
from tests.faults.serving import save_model
from tests.faults.serving import write_config
from tests.server.process import ROOT
from tests.server.process import Server
from tests.server.process import wait_for

CONF = str(ROOT / "gunicorn.conf.py")
SLEEP = "import time; time.sleep(600)"
META = 'model.lm_head.to("meta")'
# of the faults that tests/deployment brings over a deployment, those of each hook
IN_A_HOOK = (
    "plan-raises",
    "plan-returns-none",
    "load-raises",
    "load-returns-a-dict",
    "release-raises",
    "validate-raises",
    "places-raises",
    "places-nothing",
    "places-other-ids",
)
HANGS = {
    "plan": hook("plan", SLEEP),
    "load": load_then(SLEEP),
    "validate": hook("validate", SLEEP),
    "place_inputs": hook("place_inputs", SLEEP),
    "release": load_then(META) | hook("release", SLEEP),
}


def serve(folder: Path, model: Path, **deployment: Any) -> Server:
    write_config(folder, model, **deployment)
    return Server(folder / "log", conf=CONF, cwd=folder, OMP_NUM_THREADS="1")


def errors(server: Server) -> list[str]:
    """Messages of level error, without what gunicorn says of the end of its worker."""
    found = [json.loads(x) for x in server.log().splitlines() if x.startswith("{")]
    ours = [x for x in found if x["level"] == "error" and "traceback" not in x]
    return [
        x["message"] for x in ours if not x["message"].startswith(("Worker", "Shutting", "Rea"))
    ]


def fails(server: Server, status: int, *words: str) -> None:
    """It ends with the status, one line that has these words, and was never ready."""
    assert server.exit_status() == status
    (line,) = errors(server)
    for word in words:
        assert word in line
    assert "is ready" not in server.log()
    assert "Traceback" not in server.log()


@pytest.fixture(scope="module", autouse=True)
def hanging(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[dict[str, Server]]:
    """A server for each hook that hangs. They wait for their load_timeout_s beside the other tests
    here, and are looked at by the last.
    """
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, hooks in HANGS.items():
            folder = tmp_path_factory.mktemp(name)
            write(folder / "strategies", f"hangs-in-{name.replace('_', '-')}", hooks)
            words: dict[str, Any] = {"strategy": f"hangs-in-{name.replace('_', '-')}"}
            words |= {"strategy_dirs": ["./strategies"], "load_timeout_s": 10}
            servers[name] = stack.enter_context(serve(folder, model, **words))
        yield servers


def test_a_plugin_that_raises_or_returns_nonsense_in_any_hook_is_named_and_the_next_serves(
    tmp_path: Path, model: Path
) -> None:
    dirs = tmp_path / "strategies"
    for name in IN_A_HOOK:
        place(dirs, name)
    first, *others = IN_A_HOOK
    words = {"strategy": first, "fallback": [*others, "cpu"], "strategy_dirs": [str(dirs)]}
    with serve(tmp_path, model, **words) as server:
        wait_for("readiness", lambda: server.port and server.try_get("/health/ready") == 200)
        document = server.get("/placement").json
    assert document["strategy"]["name"] == "cpu"
    told = {attempt["strategy"]: attempt for attempt in document["attempts"]}
    assert list(told) == list(IN_A_HOOK)
    for name in IN_A_HOOK:
        assert told[name]["stage"] == FAULTS[name].stage
        for words_of in FAULTS[name].says:
            assert words_of in told[name]["error"]["message"]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def corrupt_shard(folder: Path) -> str:
    with shards(folder)[0].open("r+b") as file:
        file.write(b"\xff" * 64)
    return shards(folder)[0].name


def short_shard(folder: Path) -> str:
    with shards(folder)[0].open("r+b") as file:
        file.truncate(shards(folder)[0].stat().st_size - 100)
    return shards(folder)[0].name


def missing_shard(folder: Path) -> str:
    name = shards(folder)[0].name
    shards(folder)[0].unlink()
    return name


@pytest.mark.parametrize("damage", [corrupt_shard, short_shard, missing_shard])
def test_a_damaged_or_missing_shard_is_named(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    from tests.support.tiny import tiny_model

    folder = save_model(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    name = damage(folder)
    with serve(tmp_path, folder) as server:
        fails(server, 6, name)


OFFLOADS = load_then(
    "from accelerate.utils import offload_weight",
    "config.offload_folder.mkdir(parents=True, exist_ok=True)",
    "weight = model.lm_head.weight.detach()",
    "offload_weight(weight, 'lm_head.weight', str(config.offload_folder))",
)
"""Writes 66 KB as accelerate does for weights that go to disk."""


def offloading(tmp_path: Path, model: Path, shell: str, *shells_in: str) -> Server:
    """A server whose load writes weights to its offload folder, begun by a shell."""
    write(tmp_path / "strategies", "offloads", OFFLOADS)
    words = {"strategy": "offloads", "strategy_dirs": ["./strategies"]}
    write_config(tmp_path, model, **words, offload_folder=str(tmp_path / "offload"))
    quiet = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = (
        *shells_in,
        "bash",
        "-c",
        f'{shell}; exec "{sys.executable}" -m gunicorn -c "{CONF}"',
    )
    return Server(tmp_path / "log", command=command, cwd=tmp_path, **quiet)


def test_a_full_disk_for_the_offload_folder_is_told(tmp_path: Path, model: Path) -> None:
    # no file may become larger than 50 KiB: to a program, a disk that is full
    with offloading(tmp_path, model, "ulimit -f 50") as server:
        fails(server, 1, "strategy offloads: load raised OSError", "File too large")


def may_mount() -> bool:
    """A small file system, in a mount namespace of its own."""
    mount = ("unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", "/mnt")
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(mount, capture_output=True, check=False).returncode == 0
    return False


@pytest.mark.skipif(not may_mount(), reason="may not mount a file system here")
def test_a_full_file_system_for_the_offload_folder_is_told(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "offload"
    folder.mkdir()
    mount = f'mount -t tmpfs -o size=40k tmpfs "{folder}"'
    # the mount ends with the server, whose namespace it is in
    with offloading(tmp_path, model, mount, "unshare", "-m") as server:
        # accelerate writes through a memory map, for whose pages there is no room then
        fails(server, 1, "2 workers in a row were killed", "after SIGBUS, make room on the disk")


@pytest.mark.parametrize("name", HANGS)
def test_a_plugin_that_hangs_in_a_hook_ends_the_start_and_is_named(
    hanging: dict[str, Server], name: str
) -> None:
    named = f"strategy hangs-in-{name.replace('_', '-')} was not done within load_timeout_s: 10 s"
    fails(hanging[name], 1, named)
