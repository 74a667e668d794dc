"""What would fit instead: searched for and planned, the cheapest loss first."""

import dataclasses
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass

from service.config.schema import ModelConfig
from service.errors import DoesNotFit
from service.errors import PlacementUnavailable
from service.placement.hardware import Cpu
from service.placement.hardware import Gpu
from service.placement.hardware import Hardware
from service.placement.plan import Placement
from service.placement.registry import Registry
from service.placement.registry import Strategy

GIB = 2**30
CARDS = ((1, 16), (1, 24), (2, 24), (1, 48), (1, 80), (2, 80), (1, 141), (4, 80), (8, 80), (8, 141),
         (8, 180), (8, 268))  # fmt: skip
RAM = (16, 32, 64, 128, 256, 512, 1024, 2048)
# contexts are offered in steps of this many tokens, and none is shorter
STEP = 256
FORMATS = (
    ("int8", "8-bit int8"),
    ("nf4", "4-bit nf4, double quant."),
    ("int4", "4-bit int4, fast on a CPU"),
)

Changes = Mapping[str, object]
Fits = Callable[[Changes], Placement | None]


@dataclass(frozen=True)
class Alternative:
    """Something that would fit: in words, what to type, and what it leaves free per device."""

    what: str
    flag: str
    weights: int
    left: tuple[int, ...]


def find(
    config: ModelConfig, strategy: Strategy, hardware: Hardware, registry: Registry
) -> Iterator[Alternative]:
    """Every alternative was planned by the strategy it names. config: one that does not fit.

    In this order, which is that of what is lost: nothing (more of the machine), sequences at once,
    exactness (int8, then nf4), context, several of these, speed (offload, the CPU), money.
    """

    def fits(changes: Changes) -> Placement | None:
        other = registry.strategies.get(str(changes.get("strategy", strategy.name)))
        if other is None:
            return None
        if other is not strategy:
            changes = {**changes, "options": None}
        return _try(config.model_copy(update=dict(changes)), other, hardware)

    ranked = sorted(_candidates(config, hardware, fits), key=lambda found: found[0])
    for _, what, changes, placement in ranked:
        yield _alternative(what, flags(changes), placement, hardware)
    for what, machine in _machines(hardware):
        found = _try(config, strategy, machine)
        if found is not None:
            label = config.quantize if config.quantize != "none" else found.dtype or config.dtype
            yield _alternative(f"{label} on {what}", "(other hardware)", found, machine)
            return


def flags(changes: Changes) -> str:
    """What to type: --strategy first, then a --set per key."""
    words = [f"--strategy {changes['strategy']}"] if "strategy" in changes else []
    words += [f"--set {key}={value}" for key, value in changes.items() if key != "strategy"]
    return " ".join(words)


def _candidates(
    config: ModelConfig, hardware: Hardware, fits: Fits
) -> Iterator[tuple[int, str, Changes, Placement]]:
    """Rank, words, changes and plan of what fits on this machine."""
    wide: Changes = {}
    if len(hardware.gpus) > 1 and config.strategy not in ("auto-shard", "four-bit"):
        wide = {"strategy": "auto-shard"}
    found = fits(wide) if wide else None
    if found is not None:
        yield 0, "over all GPUs", wide, found
    for rank, what, changes in _formats(config):
        for more, where in ((changes, ""), ({**wide, **changes}, ", over all GPUs")):
            found = fits(more) if more else None
            if found is not None:
                yield rank, f"{what}{where}", more, found
            elif less := _less(config, more, fits):
                said, changed, found = less
                if not changes:  # only sequences or context are lost
                    yield (4 if "max_context" in changed else 1), said, changed, found
                else:
                    yield 5, f"{what}{where}, {said}", changed, found
            if not wide or found is not None:
                break
    yield from _slower(config, hardware, fits)


def _formats(config: ModelConfig) -> Iterator[tuple[int, str, Changes]]:
    """As asked, then every smaller format of the weights."""
    yield 0, "", {}
    smaller = {"none": FORMATS, "int8": FORMATS[1:]}.get(config.quantize, ())
    for rank, (quantize, what) in enumerate(smaller, 2):
        yield rank, what, {"quantize": quantize}


def _less(
    config: ModelConfig, changes: Changes, fits: Fits
) -> tuple[str, Changes, Placement] | None:
    """With fewer sequences, or if one is too many with the longest context of one that fits."""
    lowest = {**changes, "max_sequences": 1, "max_context": min(STEP, config.max_context)}
    if config.kv_tokens is not None:
        lowest["kv_tokens"] = None
    if fits(lowest) is None:
        return None
    lowest.pop("kv_tokens", None)

    def sequences(count: int) -> Changes:
        tokens = {} if config.kv_tokens is None else {"kv_tokens": config.max_context * count}
        return {**changes, "max_sequences": count, **tokens}

    def context(steps: int) -> Changes:
        tokens = {} if config.kv_tokens is None else {"kv_tokens": STEP * steps}
        return {**changes, "max_context": STEP * steps, "max_sequences": 1, **tokens}

    most = _most(config.max_sequences - 1, lambda count: fits(sequences(count)))
    if most is not None:
        count, found = most
        noun = "sequence" if count == 1 else "sequences"
        return f"{count:,} {noun} at once", sequences(count), found
    longest = _most((config.max_context - 1) // STEP, lambda steps: fits(context(steps)))
    if longest is None:
        return None
    steps, found = longest
    reached = found.context or STEP * steps
    return f"{reached:,} tokens of context, one sequence", context(steps), found


def _most(highest: int, fits: Callable[[int], Placement | None]) -> tuple[int, Placement] | None:
    """The largest count up to `highest` that fits, by bisection; None if not even 1 does."""
    best = (1, fits(1)) if highest >= 1 else (0, None)
    low, high = 1, highest
    while low < high and best[1] is not None:
        middle = (low + high + 1) // 2
        found = fits(middle)
        if found is None:
            high = middle - 1
        else:
            low, best = middle, (middle, found)
    return None if best[1] is None else (best[0], best[1])


def _slower(
    config: ModelConfig, hardware: Hardware, fits: Fits
) -> Iterator[tuple[int, str, Changes, Placement]]:
    """Nothing is lost but time."""
    if config.on_no_fit == "refuse" and hardware.gpus and config.quantize == "none":
        for store, words in (("offload-cpu", "in RAM"), ("offload-disk", "in RAM and on disk")):
            changes = {"strategy": "auto-shard", "on_no_fit": store}
            found = fits(changes)
            if found is not None:
                yield 6, f"the rest {words}, slowly", changes, found
                break
    if config.strategy != "cpu" and hardware.gpus:
        found = fits({"strategy": "cpu"})
        if found is not None:
            yield 7, "in RAM, computed by the CPU", {"strategy": "cpu"}, found


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
    free = {gpu.id: gpu.free_bytes for gpu in hardware.gpus}
    free |= {"cpu": hardware.cpu.free_bytes, "disk": hardware.disk_free_bytes}
    memory = placement.memory
    left = tuple(free[device] - memory[device].total for device in placement.devices)
    return Alternative(what, flag, sum(m.weights for m in memory.values()), left)
