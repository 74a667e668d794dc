"""Why a module is where it is planned, and what would move it: planned, not guessed."""

from collections.abc import Iterator
from dataclasses import dataclass

from service.config.schema import ModelConfig
from service.config.suggesting import did_you_mean
from service.errors import StartupError
from service.placement.hardware import Hardware
from service.placement.plan import DeviceMemory
from service.placement.plan import Placement
from service.placement.plan import Unit
from service.placement.plan import device_of
from service.placement.registry import Strategy
from service.placement.sizes import in_words


@dataclass(frozen=True)
class Reason:
    """One module's place: the unit that holds it, its device, sentences, and changes that move it.

    moves has (flag, device): what to type and where the unit would be then.
    """

    unit: Unit
    device: str
    sentences: tuple[str, ...]
    moves: tuple[tuple[str, str], ...]


def explain_module(
    name: str, config: ModelConfig, strategy: Strategy, hardware: Hardware, placement: Placement
) -> Reason:
    """The reason for one module's place in a plan that fits.

    name: a module of the model, whole ("model.layers.3") or inside one ("model.layers.3.mlp").
    Raises ValueError, with a suggestion, for a module the model does not have.
    """
    unit = _unit(name, placement)
    device = device_of(unit.name, placement.module_map) or "?"
    facts = [
        f"{unit.name} has {in_words(unit.weights)} of weights and {in_words(unit.kv)} of KV cache"
    ]
    if not unit.weights and not unit.kv:
        facts = [f"{unit.name} has no bytes of its own: it shares a tensor"]
    facts.append(reason(device, hardware, placement))
    moves = tuple(_moves(unit, device, config, strategy, hardware))
    return Reason(unit, device, tuple(facts), moves)


def _unit(name: str, placement: Placement) -> Unit:
    for unit in placement.units:
        if unit.name == name or name.startswith(f"{unit.name}."):
            return unit
    names = [unit.name for unit in placement.units]
    parts = [inside for inside in names if inside.startswith(f"{name}.")]
    if parts:
        raise ValueError(f"{name} is placed in parts; ask for one of {', '.join(parts[:6])}")
    raise ValueError(f"the model has no module {name}{did_you_mean(name, names)}")


def reason(device: str, hardware: Hardware, placement: Placement) -> str:
    """Why a module is on this device, after its name: alone, next in order, or offloaded.

    Says of the room only what is so in this plan: a strategy may cut by other rules than ours.
    """
    compute = [d for d in placement.devices if _runs(d, placement)]
    if not compute:
        return f"it is on {device} because the strategy says so"
    lefts = [_left(one, hardware, placement) for one in compute]
    largest = max((unit.weights + unit.kv for unit in placement.units), default=0)
    if not _runs(device, placement):
        full = max(lefts) < largest
        because = f"{' and '.join(compute)} are full with the KV cache reserved first"
        why = because if full else "the strategy puts it there"
        return f"it rests on {device} because {why}; it runs on {placement.main_device}"
    if len(compute) < 2:
        return f"it is on {device} because nothing else computes in this plan"
    here = [u for u in placement.units if device_of(u.name, placement.module_map) == device]
    left = _left(device, hardware, placement)
    first, last = here[0].name, here[-1].name
    # two neighbouring cuts are each at most one unit off
    even = max(lefts) - min(lefts) <= 2 * largest
    cut = "cut so that the room left is even" if even else "as the strategy cuts it; room left"
    where = f"it is on {device} with {len(here)} neighbours from {first} to {last}"
    return f"{where}, {cut}: {in_words(left)} on {device}"


def _runs(device: str, placement: Placement) -> bool:
    """Whether a device computes, rather than only stores offloaded weights."""
    return device == placement.main_device or _planned(device, placement).kv > 0


def _left(device: str, hardware: Hardware, placement: Placement) -> int:
    free = {gpu.id: gpu.free_bytes for gpu in hardware.gpus} | {"cpu": hardware.cpu.free_bytes}
    return free.get(device, 0) - _planned(device, placement).total


def _planned(device: str, placement: Placement) -> DeviceMemory:
    """Nothing for a device that a strategy names without saying what is there."""
    return placement.memory.get(device, DeviceMemory())


def _moves(
    unit: Unit, device: str, config: ModelConfig, strategy: Strategy, hardware: Hardware
) -> Iterator[tuple[str, str]]:
    for flag, key, value in _changes(config):
        try:
            other = strategy.plan(config.model_copy(update={key: value}), hardware)
        except StartupError:
            continue
        there = device_of(unit.name, other.module_map)
        if there is not None and there != device:
            yield flag, there


def _changes(config: ModelConfig) -> Iterator[tuple[str, str, object]]:
    """Settings that change how much room there is: what to type, key, value."""
    if config.quantize == "none":
        yield "--set quantize=nf4", "quantize", "nf4"
    for key, value in (
        ("max_sequences", config.max_sequences),
        ("max_context", config.max_context),
    ):
        for changed in (value // 2, value * 2):
            if changed:
                yield f"--set {key}={changed}", key, changed
