"""Placement: what a strategy decided, as data. `moorage plan` prints what `load` passes on."""

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any


@dataclass(frozen=True)
class Unit:
    """A part of the model that is placed as a whole: a decoder layer, an embedding, a norm.

    weights: bytes of its parameters and buffers. kv: bytes of KV cache reserved for it, all
    sequences at full context; 0 for everything but attention layers.
    """

    name: str
    weights: int
    kv: int = 0


@dataclass(frozen=True)
class DeviceMemory:
    """Planned bytes on one device. parts says what `overhead` is made of, and adds up to it."""

    weights: int = 0
    kv: int = 0
    overhead: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.overhead


@dataclass(frozen=True)
class Placement:
    """Where a model will go.

    devices            what will hold something, main device first: "cuda:0", "cpu", "disk"
    module_map         module or tensor name -> device; "" is the whole model; empty: not said
    memory             device -> planned bytes
    load_kwargs        exactly what goes to `from_pretrained`
    main_device        where token ids go
    allows             intended findings the certificate accepts: "offload", or names of tensors
                       whose absence or values are meant (F3, F15, F16)
    quantized          linear layers that must be quantised after the load; None if unknown
    packed             linear layers that get a packed copy after the load; its bytes are weights
    kv_bytes_per_token KV cache of one token over all layers
    kv_tokens          tokens of KV reserved: max_context x max_sequences, or less if so configured
    parameters         of the whole model, tied ones once
    dtype              of the weights and the KV cache, torch's name
    context            most tokens of one sequence: max_context, or the model's own lower limit
    units              the parts that were placed, in the model's order
    ranks              processes that share the model
    notes              sentences for the operator
    """

    devices: tuple[str, ...] = ()
    module_map: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, DeviceMemory] = field(default_factory=dict)
    load_kwargs: Mapping[str, Any] = field(default_factory=dict)
    main_device: str | None = None
    allows: frozenset[str] = frozenset()
    quantized: int | None = None
    packed: int = 0
    kv_bytes_per_token: int = 0
    kv_tokens: int = 0
    parameters: int | None = None
    dtype: str | None = None
    context: int | None = None
    units: tuple[Unit, ...] = ()
    ranks: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModuleGroup:
    """Neighbours on one device: "model.layers.0-39", and each of them in the model's order."""

    name: str
    units: tuple[Unit, ...]

    @property
    def count(self) -> int:
        return len(self.units)

    @property
    def bytes(self) -> int:
        """Of weights."""
        return sum(unit.weights for unit in self.units)


def groups(placement: Placement) -> dict[str, list[ModuleGroup]]:
    """Device -> its units in the model's order, runs of numbered neighbours written as one."""
    found: dict[str, list[Unit]] = {device: [] for device in placement.devices}
    for unit in placement.units:
        device = device_of(unit.name, placement.module_map)
        if device is not None:
            found.setdefault(device, []).append(unit)
    return {device: runs(units) for device, units in found.items()}


def runs(units: Iterable[Unit]) -> list[ModuleGroup]:
    """Units with runs of numbered neighbours written as one, "model.layers.0-39", also where layers
    are cut open: "model.layers.0-39.mlp.experts".
    """
    found: list[list[Unit]] = []
    running: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        before, number, after = _numbered(unit.name)
        run = running.get((before, after))
        if run is not None and number == (_numbered(run[-1].name)[1] or 0) + 1:
            run.append(unit)
            continue
        found.append([unit])
        if number is not None:
            running[before, after] = found[-1]
    return [_group(run) for run in found]


def _group(run: list[Unit]) -> ModuleGroup:
    before, first, after = _numbered(run[0].name)
    last = _numbered(run[-1].name)[1]
    name = run[0].name if len(run) == 1 else f"{before}{first}-{last}{after}"
    return ModuleGroup(name, tuple(run))


def _numbered(name: str) -> tuple[str, int | None, str]:
    """A name about its last number: ("model.layers.", 3, ".mlp"); (name, None, "") without one."""
    parts = name.split(".")
    for place in range(len(parts) - 1, -1, -1):
        if parts[place].isdigit():
            before, after = parts[:place], parts[place + 1 :]
            return (
                "".join(f"{p}." for p in before),
                int(parts[place]),
                "".join(f".{p}" for p in after),
            )
    return name, None, ""


def device_of(name: str, module_map: Mapping[str, str]) -> str | None:
    """The device of a module or tensor: its own entry, its nearest parent's, or None.

    Matches whole dotted names, unlike accelerate, where "layers.1" also takes layers.10 (F9).
    """
    while name not in module_map:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return module_map[name]
