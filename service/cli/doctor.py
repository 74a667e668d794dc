"""`moorage doctor`: everything that could keep a deployment from being served, before it is."""

import errno
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any
from typing import Literal

import typer

from service.cli import options
from service.cli import report
from service.cli import terminal
from service.config import reading
from service.config.flags import Flags
from service.config.schema import Config
from service.errors import ConfigError
from service.errors import ServiceError

if TYPE_CHECKING:
    from service.placement.chain import Step

GIB = 2**30
PACKAGES = ("transformers", "torch", "accelerate")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, not written to


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: its level, what is so, and the way out of it."""

    level: Literal["ok", "warn", "error"]
    text: str
    fix: str | None = None


@report.guard
def doctor(
    config: options.Config = None,
    deployment: options.Deployment = None,
    settings: options.Set = None,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Also reproduce failure classes with the installed libraries (some seconds).",
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check versions, devices, config, strategies, model, cache, port. Exit status 5 on errors."""
    findings = []
    asked = examine(options.flags(config, deployment, settings))
    for finding in chain(asked, reproductions() if self_test else ()):
        findings.append(finding)
        if not as_json:
            show(finding, terminal.columns())
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warn" for finding in findings)
    if as_json:
        report.print_json(
            {
                "object": "doctor",
                "errors": errors,
                "warnings": warnings,
                "findings": [{"level": f.level, "text": f.text, "fix": f.fix} for f in findings],
            }
        )
    else:
        colour = "bold red" if errors else "bold yellow" if warnings else "bold green"
        told = f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
        terminal.say(told, ((".+", colour),))
    if errors:
        raise typer.Exit(5)


LABELS = {"ok": " ok   ", "warn": " WARN ", "error": " ERROR"}
STYLES: terminal.Styles = (
    ("^ ok ", "green"),
    ("^ WARN ", "bold yellow"),
    ("^ ERROR ", "bold red"),
    (r"(^       |   )fix:", "bold"),
)


def show(finding: Finding, columns: int | None) -> None:
    """On stdout."""
    for line in lines(finding, columns):
        terminal.say(line, STYLES)


def lines(finding: Finding, columns: int | None) -> list[str]:
    """ " ERROR text   fix: way out". On a terminal where that is too long, the fix has lines of its
    own. columns: None for a pipe, which gets one line.
    """
    text = f"{LABELS[finding.level]} {finding.text}"
    fix = f"fix: {finding.fix}" if finding.fix else ""
    whole = f"{text}   {fix}" if fix else text
    if columns is None or len(whole) <= columns:
        return [whole]
    below = terminal.fold(f"       {fix}", columns, 12) if fix else []
    return [*terminal.fold(text, columns, 7), *below]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def examine(flags: Flags) -> Iterator[Finding]:
    """Every finding, in the order in which a start would meet them."""
    yield from versions()
    yield from devices()
    yield from shared_memory(SHARED_MEMORY)
    try:
        config = reading.load_process(flags)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("error", f"{problem.where}: {problem.key}: {problem.message}")
        return
    named = str(config.path) if config.path else "no config file, the embedded default"
    yield Finding("ok", f"config: {named}, deployment {config.name}")
    for notice in config.notices:
        yield Finding("warn", notice)
    yield from quantizer(config)
    yield from strategies(config)
    yield from model(config)
    yield from cache(config.cache)
    yield from port(config.server.bind)


# the process may start anywhere: it must find this very package
SELF_TEST = """
import sys
sys.path.insert(0, ROOT)
from service.testing.self_test.run import main
main()
"""
SELF_TEST_TIMEOUT_S = 300


def reproductions() -> Iterator[Finding]:
    """Which failure classes the installed libraries still have, and whether ours catches them.

    In a process of its own: one of them breaks transformers for the rest of its process.
    """
    code = SELF_TEST.replace("ROOT", repr(str(Path(__file__).resolve().parents[2])))
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SELF_TEST_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding("error", f"the self-test was not done within {SELF_TEST_TIMEOUT_S} s")
        return
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        yield Finding("error", f"the self-test broke off: {said}", "report this with the versions")
        return
    for line in done.stdout.splitlines():
        yield _reproduced(json.loads(line))


def _reproduced(outcome: dict[str, Any]) -> Finding:
    head = f"{outcome['failure_class']} {outcome['what']}"
    if outcome["there"] is None and outcome["caught"] is None:
        return Finding("ok", f"{head}: not tried, {outcome['why']}")
    if outcome["there"] is None:
        fix = "report this with the versions"
        return Finding("warn", f"{head}: could not be tried: {outcome['why']}", fix)
    there = "still so" if outcome["there"] else "no longer so"
    if outcome["caught"] is None:
        return Finding("ok", f"{head}: {there} with these versions")
    if outcome["caught"]:
        return Finding("ok", f"{head}: {there} with these versions; caught")
    fix = "do not serve with these versions; report them"
    return Finding("error", f"{head}: {there} with these versions, and NOT caught", fix)


def _failed(error: ServiceError) -> Finding:
    return Finding("error", " ".join(error.message.split()), error.hint)


def versions() -> Iterator[Finding]:
    """What is installed. A missing package is an error of its own."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding("error", f"{package} is not installed", f"pip install {package}")
    yield Finding("ok", ", ".join(found))


def devices() -> Iterator[Finding]:
    """Accelerators as torch sees them, and who else uses their memory."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch's is missing
        yield Finding("error", f"torch cannot be imported: {error}", "install torch again")
        return
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            yield Finding(
                "warn",
                f"an NVIDIA driver is here, but torch {torch.__version__} cannot use it",
                "install the torch build for the driver's CUDA version",
            )
        yield Finding("ok", "no accelerator; models run on the CPU (strategy: cpu)")
        return
    others = _processes()
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("ok", f"cuda:{index}: {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
        used = total - free
        if used > total // 20:
            by = others.get(str(torch.cuda.get_device_properties(index).uuid), [])
            who = f" by pid {', '.join(by)}" if by else ""
            yield Finding(
                "warn",
                f"cuda:{index}: {used / GIB:.1f} GiB in use{who}. plan counts it as taken.",
            )


def _processes() -> dict[str, list[str]]:
    """GPU's uuid without "GPU-" -> process ids on it, from nvidia-smi; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, list[str]] = {}
    for row in done.stdout.splitlines() if done.returncode == 0 else ():
        uuid, _, pid = row.partition(",")
        if pid.strip().isdigit():
            found.setdefault(uuid.strip().removeprefix("GPU-"), []).append(pid.strip())
    return found


def shared_memory(folder: Path) -> Iterator[Finding]:
    """gunicorn's heartbeat file lies there; on a slow disk a busy worker looks dead."""
    if folder.is_dir() and os.access(folder, os.W_OK):
        return
    yield Finding(
        "warn",
        f"{folder} is missing or not writable; gunicorn's heartbeat goes to a disk instead",
        "mount a tmpfs there (docker: --shm-size)",
    )


def quantizer(config: Config) -> Iterator[Finding]:
    steps = (step.changes.get("quantize", "none") for step in config.deployment.fallback)
    asked = dict.fromkeys((config.deployment.quantize, *steps))
    wanted = ", ".join(quantize for quantize in asked if quantize != "none")
    if not wanted:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Finding(
            "error",
            f"quantize: {wanted} needs bitsandbytes, which is not installed.",
            "pip install 'moorage[bnb]'",
        )
        return
    yield Finding(
        "ok", f"quantize: {wanted}, bitsandbytes {importlib.metadata.version('bitsandbytes')}"
    )


def strategies(config: Config) -> Iterator[Finding]:
    """Broken strategies, all of them; whether the chosen ones are there and take their options."""
    from service.placement import registry
    from service.placement.chain import steps_among

    try:
        found = registry.build(config.deployment.strategy_dirs)
    except ServiceError as error:
        yield _failed(error)
        return
    for broken in found.broken.values():
        yield _failed(broken)
    sound = True
    steps: tuple[Step, ...] = ()
    try:
        steps = steps_among(found, config)
    except ConfigError as error:
        sound = False
        for problem in error.problems:
            yield Finding("error", f"{problem.where}: {problem.key}: {problem.message}")
    for step in steps:
        sound = sound and step.fault is None
        if step.stage == "options" and step.fault is not None:
            yield _failed(step.fault)
    if sound:
        names = ", then ".join(map(str, steps))
        yield Finding("ok", f"strategy {names}; {len(found.strategies)} found")


def model(config: Config) -> Iterator[Finding]:
    """Whether the model is here and sound. Downloads at most a config.json."""
    from service.models import fetch
    from service.models.catalogue import CATALOGUE
    from service.models.locate import locate
    from service.models.locate import locate_for_plan

    words = config.deployment.model
    if words in CATALOGUE and not fetch.is_here(words, config.cache):
        size = CATALOGUE[words].download_bytes / 1e6
        yield Finding(
            "warn",
            f"model {words} is not here yet; the first start downloads {size:.0f} MB",
            f"moorage model fetch {words}",
        )
        return
    here = words in CATALOGUE or Path(words).expanduser().exists()
    try:
        found = locate(config) if here else locate_for_plan(config)
    except ServiceError as error:
        yield _failed(error)
        return
    if here:
        yield Finding("ok", f"model {found.model_id}: {found.folder}")
    else:
        yield Finding("ok", f"model {found.model_id}: config.json read; weights not looked at")


def cache(folder: Path) -> Iterator[Finding]:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        yield Finding(
            "error",
            f"cache {folder} is not writable ({there})",
            "set MOORAGE_CACHE to a folder that is",
        )
        return
    free = shutil.disk_usage(there).free
    yield Finding("ok", f"cache {folder}: writable, {free / GIB:.1f} GiB free")


def port(bind: str) -> Iterator[Finding]:
    """Whether the address can be bound now."""
    if bind.startswith("unix:"):
        folder = Path(bind.removeprefix("unix:")).absolute().parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            yield Finding("error", f"bind {bind}: {folder} is not a writable folder")
        return
    host, _, number = bind.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(number)))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            yield Finding(
                "error",
                f"bind {bind}: {'another process uses it' if taken else error.strerror}",
                "stop that process, or choose another address: MOORAGE_BIND=127.0.0.1:8001",
            )
            return
    yield Finding("ok", f"{bind} is free")
