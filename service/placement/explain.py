"""A plan in the operator's words: what goes where, whether it fits, and what would.

`explain` takes facts and returns data; `moorage plan` prints it and `--json` dumps it.
"""

import dataclasses
import logging
import re
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass

from service.config.schema import ModelConfig
from service.errors import DoesNotFit
from service.errors import PlacementUnavailable
from service.placement import footprint
from service.placement.hardware import Cpu
from service.placement.hardware import Gpu
from service.placement.hardware import Hardware
from service.placement.plan import DeviceMemory
from service.placement.plan import ModuleGroup
from service.placement.plan import Placement
from service.placement.plan import Unit
from service.placement.plan import groups
from service.placement.plan import runs
from service.placement.registry import Registry
from service.placement.registry import Strategy

GIB = 2**30
CARDS = ((1, 16), (1, 24), (2, 24), (1, 48), (1, 80), (2, 80), (1, 141), (4, 80), (8, 80), (8, 141))
RAM = (16, 32, 64, 128, 256, 512, 1024)


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
class Alternative:
    """Something that would fit: in words, what to type, and what it leaves free per device."""

    what: str
    flag: str
    weights: int
    left: tuple[int, ...]


@dataclass(frozen=True)
class PlanReport:
    """Everything `moorage plan` says. `placement` is None when it does not fit; `error` says why.

    room_tokens: tokens of KV cache that the devices could hold in all.
    """

    config: ModelConfig
    devices: tuple[DevicePlan, ...] = ()
    placement: Placement | None = None
    room_tokens: int = 0
    error: DoesNotFit | None = None
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()


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
            alternatives=tuple(_alternatives(config, strategy, hardware, registry)),
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


# --- what would fit


def _alternatives(
    config: ModelConfig, strategy: Strategy, hardware: Hardware, registry: Registry
) -> Iterator[Alternative]:
    for what, flag, changes in _settings(config, hardware):
        other = registry.strategies.get(str(changes.get("strategy", strategy.name)))
        if other is None:
            continue
        if other is not strategy:
            changes = {**changes, "options": None}
        found = _try(config.model_copy(update=changes), other, hardware)
        if found is not None:
            yield _alternative(what, flag, found, hardware)
    for what, machine in _machines(hardware):
        found = _try(config, strategy, machine)
        if found is not None:
            label = config.quantize if config.quantize != "none" else found.dtype or config.dtype
            yield _alternative(f"{label} on {what}", "(other hardware)", found, machine)
            return


def _settings(
    config: ModelConfig, hardware: Hardware
) -> Iterator[tuple[str, str, Mapping[str, object]]]:
    """Changes worth trying, the least painful first: words, flag, keys."""
    if config.quantize == "none":
        for quantize, what in (("int8", "8-bit int8"), ("nf4", "4-bit nf4, double quant.")):
            yield what, f"--set quantize={quantize}", {"quantize": quantize}
    if config.max_sequences > 1:
        yield "one sequence at a time", "--set max_sequences=1", {"max_sequences": 1}
    if config.max_context > 2048:
        flag = "--set max_context=2048 --set max_sequences=1"
        yield "a short context, one at a time", flag, {"max_context": 2048, "max_sequences": 1}
    if len(hardware.gpus) > 1 and config.strategy != "auto-shard":
        yield "over all GPUs", "--strategy auto-shard", {"strategy": "auto-shard"}
    if config.on_no_fit == "refuse" and hardware.gpus and config.quantize == "none":
        flag = "--strategy auto-shard --set on_no_fit=offload-cpu"
        changes = {"strategy": "auto-shard", "on_no_fit": "offload-cpu"}
        yield "the rest in RAM, slowly", flag, changes
    if config.strategy != "cpu" and hardware.gpus:
        yield "in RAM, computed by the CPU", "--strategy cpu", {"strategy": "cpu"}


def _machines(hardware: Hardware) -> Iterator[tuple[str, Hardware]]:
    """Larger machines of the same kind: more or larger cards, or more RAM where there are none."""
    if not hardware.gpus:
        for size in RAM:
            cpu = Cpu(size * GIB, size * GIB, hardware.cpu.cores, hardware.cpu.bfloat16)
            yield f"{size} GiB of RAM", dataclasses.replace(hardware, cpu=cpu)
        return
    have = sum(gpu.total_bytes for gpu in hardware.gpus)
    for count, size in sorted(CARDS, key=lambda card: card[0] * card[1]):
        if count * size * GIB <= have:
            continue
        cards = tuple(
            Gpu(index, f"{size} GiB GPU", size * GIB, size * GIB - GIB // 2)
            for index in range(count)
        )
        yield f"{count} x {size} GiB", dataclasses.replace(hardware, gpus=cards)


def _try(config: ModelConfig, strategy: Strategy, hardware: Hardware) -> Placement | None:
    try:
        return strategy.plan(config, hardware)
    except (DoesNotFit, PlacementUnavailable):
        return None


def _alternative(what: str, flag: str, placement: Placement, hardware: Hardware) -> Alternative:
    devices = [d for d in _devices(placement, hardware) if d.id in placement.devices]
    weights = sum(memory.weights for memory in placement.memory.values())
    return Alternative(what, flag, weights, tuple(d.left for d in devices))


# --- what accelerate would do


def _auto_map(config: ModelConfig, hardware: Hardware) -> dict[str, str]:
    """The map of `device_map="auto"`: unit -> device. It plans weights only."""
    import torch
    import transformers
    from transformers.integrations import accelerate as planner

    from service.placement import guard

    hf_config = footprint.read_config(config)
    dtype = footprint.resolve_dtype(config, hf_config, on_cpu=False, native_bfloat16=True)
    with guard.LOAD_LOCK, torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
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
