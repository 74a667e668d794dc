"""Prove a plan on accelerators that are not here: real hooks, real forward, tensors without values.

    made = simulate(config, strategy, placement)
    made.status      # "proven", "refuted", "not simulated", "not applicable"

What is proven: accelerate carries out the plan's map, `place_inputs` sends ids where they belong, a
prompt and one token more run without an operator that gets tensors of two devices, and the KV cache
of each layer is where it was reserved. Nothing is said of values, memory or speed.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any
from typing import Literal

from service.config.schema import ModelConfig
from service.errors import PlacementMismatch
from service.placement.plan import Placement
from service.placement.plan import device_of
from service.placement.plan import groups
from service.placement.registry import Strategy

STORES = ("cpu", "disk")
TIMEOUT_S = 300
Status = Literal["proven", "refuted", "not simulated", "not applicable"]


@dataclass(frozen=True)
class Job:
    """A plan to be simulated: the deployment, its strategy and what that planned."""

    config: ModelConfig
    strategy: Strategy
    placement: Placement


@dataclass(frozen=True)
class Simulation:
    """What came of it.

    message: the finding, or why it was not simulated or is not applicable. devices: the simulated
    accelerators. kv: layer -> the device of its KV cache. operators: how many were watched.
    left_out: what of the plan the simulation does not have.
    """

    status: Status
    message: str = ""
    devices: tuple[str, ...] = ()
    operators: int = 0
    kv: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0
    hint: str | None = None
    failure_class: str | None = None
    tensors: tuple[str, ...] = ()

    @property
    def error(self) -> PlacementMismatch | None:
        """The finding, as an error with modules and devices; None unless it was refuted."""
        if self.status != "refuted":
            return None
        return PlacementMismatch(
            self.message, hint=self.hint, failure_class=self.failure_class, tensors=self.tensors
        )


def simulate(config: ModelConfig, strategy: Strategy, placement: Placement) -> Simulation:
    """Run one plan on simulated accelerators, in a process of its own (some seconds)."""
    return simulate_all([Job(config, strategy, placement)])[0]


def simulate_all(jobs: Sequence[Job]) -> list[Simulation]:
    """The same for several plans, one after the other in one process."""
    found = {number: _refusal(job) for number, job in enumerate(jobs)}
    asked = [number for number, refusal in found.items() if refusal is None]
    for number, made in zip(asked, _answers([jobs[n] for n in asked]), strict=True):
        found[number] = made
    return [made for _, made in sorted(found.items()) if made is not None]


def device_map(placement: Placement) -> Any:
    """The map that `load` passes on, or what the plan says of modules if it passes none."""
    return placement.load_kwargs.get("device_map") or dict(placement.module_map)


def accelerators(placement: Placement) -> tuple[str, ...]:
    """The planned devices that are neither RAM nor disk."""
    return tuple(device for device in placement.devices if device not in STORES)


def _refusal(job: Job) -> Simulation | None:
    """Why a plan need not or cannot be simulated; None if it can."""
    devices, mapped = accelerators(job.placement), device_map(job.placement)
    if not devices:
        return Simulation("not applicable", "plans no accelerator")
    if len({device.partition(":")[0] for device in devices}) > 1:
        return Simulation("not simulated", f"the plan mixes kinds of devices: {', '.join(devices)}")
    if not isinstance(mapped, Mapping) or not mapped:
        return Simulation("not simulated", "the plan names no device for its modules")
    if job.placement.ranks > 1:
        return Simulation("not simulated", f"the plan has {job.placement.ranks} processes")
    return None


def _request(job: Job) -> dict[str, Any]:
    placement, source = job.placement, Path(job.strategy.source)
    # options belong to the strategy's own model, and no hook that runs there gets them
    config = job.config.model_copy(update={"options": None, "strategy_dirs": ()})
    return {
        "kind": accelerators(placement)[0].partition(":")[0],
        "config": config.model_dump(mode="json"),
        "strategy": job.strategy.name,
        "file": str(source) if source.is_absolute() else None,
        "device_map": dict(device_map(placement)),
        "main_device": placement.main_device,
        "dtype": placement.dtype,
        "reserved": {
            unit.name: _reserved(unit.name, placement) for unit in placement.units if unit.kv
        },
    }


def _reserved(layer: str, placement: Placement) -> str | None:
    """The device whose KV cache was planned for a layer; an offloaded one runs on the main one."""
    device = device_of(layer, placement.module_map)
    return placement.main_device if device in STORES else device


def _answers(jobs: Sequence[Job]) -> Iterator[Simulation]:
    if not jobs:
        return
    asked = "".join(json.dumps(_request(job)) + "\n" for job in jobs)
    try:
        done = _process(asked)
        lines, said = done.stdout.splitlines(), done.stderr.strip().splitlines()
        why = f"the simulation ended with status {done.returncode}: {said[-1] if said else '-'}"
    except subprocess.TimeoutExpired:
        lines, why = [], f"the simulation was not done within {TIMEOUT_S} s"
    for number, job in enumerate(jobs):
        known: dict[str, Any] = {
            "devices": accelerators(job.placement),
            "left_out": tuple(_left_out(job)),
        }
        if number >= len(lines):
            yield Simulation("not simulated", why[:400], **known)
            continue
        answer: dict[str, Any] = json.loads(lines[number])
        answer["tensors"] = tuple(answer.get("tensors", ()))
        yield Simulation(**answer, **known)


def _process(asked: str) -> "subprocess.CompletedProcess[str]":
    """`simulated.main` in a process of its own, by its end. Raises subprocess.TimeoutExpired."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        "from service.testing import simulated; simulated.main()"
    )
    command = [sys.executable, "-c", code, json.dumps(sys.path)]
    return subprocess.run(
        command, input=asked, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def _left_out(job: Job) -> Iterator[str]:
    """What of the plan the simulation does not have."""
    if job.config.quantize != "none":
        yield f"the kernels of {job.config.quantize}: linears ran in {job.placement.dtype}"
    if "disk" in job.placement.devices:
        yield "the disk: offloaded tensors were kept in RAM"


def sentences(made: Simulation, placement: Placement | None) -> Iterator[str]:
    """What a simulation showed, for people: the outcome, then what was left out."""
    if made.status == "proven" and placement is not None:
        devices, cache = ", ".join(made.devices), "; ".join(kv_lines(made, placement))
        yield (
            f"SIMULATED on {devices}: {made.operators:,} operators, none across devices"
            + (f"; KV of {cache}" if cache else "; no KV cache")
            + f" ({made.seconds:.1f} s)."
        )
    elif made.status == "refuted":
        yield f"SIMULATION FAILED: {made.message}"
        if made.hint:
            yield f"fix: {made.hint}"
    else:
        yield f"{made.status}: {made.message}"
    for part in made.left_out:
        yield f"not simulated: {part}"


def kv_lines(made: Simulation, placement: Placement) -> list[str]:
    """Where the KV cache was: ["model.layers.0-39 on cuda:0", "model.layers.40-79 on cuda:1"]."""
    layers = tuple(unit for unit in placement.units if unit.name in made.kv)
    found = groups(Placement(devices=made.devices, module_map=made.kv, units=layers))
    return [
        f"{', '.join(run.name for run in runs)} on {device}"
        for device, runs in found.items()
        if runs
    ]
