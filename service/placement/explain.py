"""A plan in the operator's words: what goes where, whether it fits, and what would.

`explain` takes facts and returns data; `moorage plan` prints it and `--json` dumps it.
"""

import logging
import re
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.config.schema import ModelConfig
from service.errors import DoesNotFit
from service.placement import alternatives
from service.placement import architectures
from service.placement import footprint
from service.placement.alternatives import Alternative
from service.placement.hardware import Hardware
from service.placement.plan import DeviceMemory
from service.placement.plan import ModuleGroup
from service.placement.plan import Placement
from service.placement.plan import Unit
from service.placement.plan import groups
from service.placement.plan import runs
from service.placement.registry import Registry
from service.placement.registry import Strategy

if TYPE_CHECKING:
    from service.placement.chain import Outlook

GIB = 2**30


@dataclass(frozen=True)
class DevicePlan:
    """One device of the plan. Bytes; `left` may be negative in a map that was not ours.

    modules are (name, count): ("layers.0-39", 40), in the model's order.
    """

    id: str
    name: str
    total: int
    free: int
    planned: DeviceMemory
    modules: tuple[tuple[str, int], ...] = ()

    @property
    def left(self) -> int:
        return self.free - self.planned.total


@dataclass(frozen=True)
class PlanReport:
    """Everything `moorage plan` says. `placement` is None when it does not fit; `error` says why.

    room_tokens: tokens of KV cache that the devices could hold in all. fallback: what the steps
    after the first would plan, where the first does not fit.
    """

    config: ModelConfig
    devices: tuple[DevicePlan, ...] = ()
    placement: Placement | None = None
    room_tokens: int = 0
    error: DoesNotFit | None = None
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    fallback: "tuple[Outlook, ...]" = ()


def explain(
    config: ModelConfig, strategy: Strategy, hardware: Hardware, registry: Registry
) -> PlanReport:
    """Plan, and say what came of it. A model that does not fit is a report, not an exception.

    config: settled for `strategy`. registry: the strategies to look for alternatives among.
    Raises PlacementUnavailable, PluginError, ModelUnavailable.
    """
    try:
        placement = strategy.plan(config, hardware)
    except DoesNotFit as error:
        return PlanReport(
            config,
            error=error,
            alternatives=tuple(alternatives.find(config, strategy, hardware, registry)),
            notes=tuple(_left_to_itself(config, hardware)),
        )
    devices = tuple(_devices(placement, hardware))
    return PlanReport(
        config,
        devices,
        placement,
        _room(placement, devices),
        notes=(*placement.notes, *_auto_would_overflow(config, placement, hardware)),
    )


def _devices(placement: Placement, hardware: Hardware) -> Iterator[DevicePlan]:
    """Every device of the machine, used or not, and the disk if it is used."""
    cpu, found = hardware.cpu, groups(placement)
    facts = [(g.id, g.name, g.total_bytes, g.free_bytes) for g in hardware.gpus]
    facts.append(("cpu", "", cpu.total_bytes, cpu.free_bytes))
    if "disk" in placement.memory:
        facts.append(("disk", "", hardware.disk_free_bytes, hardware.disk_free_bytes))
    for device, name, total, free in facts:
        planned = placement.memory.get(device, DeviceMemory())
        here = found.get(device, [])
        modules = tuple((short(group), group.count) for group in here)
        if placement.module_map == {"": device}:
            modules = (("the whole model", 1),)
        yield DevicePlan(device, name, total, free, planned, modules)


def short(group: ModuleGroup) -> str:
    """A group's name without what leads to it: "layers.0-39", "lm_head"."""
    parts = group.name.split(".")
    numbered = parts[-1].replace("-", "").isdigit() and len(parts) > 1
    return ".".join(parts[-2:]) if numbered else parts[-1]


def _room(placement: Placement, devices: tuple[DevicePlan, ...]) -> int:
    """Tokens of KV that fit in all: those planned, and what the fullest device could add."""
    tokens = placement.kv_tokens
    per_device = [(d.left, d.planned.kv / tokens) for d in devices if tokens and d.planned.kv]
    more = min((left / per_token for left, per_token in per_device), default=0.0)
    return tokens + max(0, int(more))


# --- what accelerate would do


def _auto_map(config: ModelConfig, hardware: Hardware) -> dict[str, str]:
    """The map of `device_map="auto"`: unit -> device. It plans weights only."""
    import torch
    from transformers.integrations import accelerate as planner

    from service.placement import guard

    hf_config = footprint.read_config(config)
    dtype = footprint.resolve_dtype(config, hf_config, on_cpu=False, native_bfloat16=True)
    with guard.LOAD_LOCK, torch.device("meta"):
        model = architectures.class_of(hf_config, config).from_config(hf_config, dtype=dtype)
    free: dict[int | str, int] = {gpu.index: gpu.free_bytes for gpu in hardware.gpus}
    if len(free) == 1:  # transformers keeps a tenth back on a single card
        free = {index: size * 9 // 10 for index, size in free.items()}
    free |= {"cpu": hardware.cpu.free_bytes * 9 // 10, "disk": hardware.disk_free_bytes}
    # it complains about cards that are not in this machine; they are the question
    log = logging.getLogger("accelerate.utils.modeling")
    silenced, log.disabled = log.disabled, True
    try:
        room = planner.get_balanced_memory(model, free, model._no_split_modules)
        found = planner.infer_auto_device_map(
            model, max_memory=room, no_split_module_classes=model._no_split_modules
        )
    finally:
        log.disabled = silenced
    return {n: f"cuda:{d}" if isinstance(d, int) else str(d) for n, d in found.items()}


def _auto_units(config: ModelConfig, hardware: Hardware) -> dict[str, list[Unit]] | None:
    """Per device of the "auto" map its units. None: there is nothing to compare."""
    if not hardware.gpus or config.quantize != "none" or config.trust_remote_code:
        return None
    auto = _auto_map(config, hardware)
    measured = footprint.measure(config, on_cpu=False, native_bfloat16=hardware.cpu.bfloat16)
    found: dict[str, list[Unit]] = {}
    for unit in measured.units:
        found.setdefault(_covering(unit.name, auto), []).append(unit)
    return found


def _covering(name: str, auto: Mapping[str, str]) -> str:
    """The device of a unit; of one that was split, that of its first part."""
    for known, device in auto.items():
        if known in ("", name) or name.startswith(f"{known}.") or known.startswith(f"{name}."):
            return device
    return "disk"


def _left_to_itself(config: ModelConfig, hardware: Hardware) -> Iterator[str]:
    """What a plain load would have done with a model that we refuse."""
    found = _auto_units(config, hardware)
    if found is None:
        return
    parts = []
    for device, units in found.items():
        layers = [unit for unit in units if unit.kv]
        words = ", ".join(short(group) for group in runs(layers or units))
        words = re.sub(r"(\w+)\.(\d+(-\d+)?)", r"\1 \2", words)
        parts.append(f"{words} {'in RAM' if device == 'cpu' else 'on ' + device}")
    away = sum(unit.weights for rest in ("cpu", "disk") for unit in found.get(rest, []))
    yield f'Left to itself, device_map="auto" would put {", ".join(parts)}' + (
        f"; every token would then read {away / GIB:.1f} GiB over PCIe"
        f"{' and disk' if 'disk' in found else ''}."
        if away
        else ", with no room for the KV cache."
    )


def _auto_would_overflow(
    config: ModelConfig, placement: Placement, hardware: Hardware
) -> Iterator[str]:
    """Where accelerate's map of the same model would run over once the KV is full."""
    if sum(device.startswith("cuda") for device in placement.devices) < 2:
        return
    found = _auto_units(config, hardware)
    if found is None:
        return
    counts = "/".join(str(sum(1 for u in units if u.kv)) for units in found.values())
    for gpu in hardware.gpus:
        over = sum(u.weights + u.kv for u in found.get(gpu.id, [])) - gpu.free_bytes
        if over > 0:
            yield (
                f"accelerate's balanced map ({counts} layers) would overflow {gpu.id} by "
                f"{over / GIB:.1f} GiB once the KV is full; this plan reserves KV first."
            )
            return
