"""Which unit goes on which device. Pure arithmetic: units and budgets in, names out."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence

from service.placement.plan import Unit


def staged(away: Iterable[Unit]) -> Unit:
    """What offloaded units take of the main device, on which they run, as one unit.

    The largest one's weights pass through it; the KV of all of them stays there.
    """
    units = list(away)
    weights = max((unit.weights for unit in units), default=0)
    return Unit("staged", weights, sum(unit.kv for unit in units))


def balance(units: Sequence[Unit], budgets: Mapping[str, int]) -> Mapping[str, str] | None:
    """One run of units per device, so that the least room left is the largest possible.

    A unit needs its weights and its KV on the same device. budgets: device -> bytes.
    Returns None when they do not fit. Bisection over the room left; filling greedily in order
    decides each step, because the runs are contiguous.
    """
    low, high = 0, max(budgets.values(), default=0)
    best = _fill(units, budgets, 0)
    if best is None:
        return None
    while high - low > 2**20:
        middle = (low + high) // 2
        found = _fill(units, budgets, middle)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return best


def _fill(
    units: Sequence[Unit], budgets: Mapping[str, int], spare: int
) -> Mapping[str, str] | None:
    """Fill the devices in order, each with `spare` bytes left; None if they do not do."""
    places: dict[str, str] = {}
    devices = iter(budgets.items())
    device, room = next(devices, ("", -1))
    room -= spare
    for unit in units:
        need = unit.weights + unit.kv
        while need > room:
            device, room = next(devices, ("", -1))
            if not device:
                return None
            room -= spare
        places[unit.name] = device
        room -= need
    return places


def offload(
    units: Sequence[Unit],
    budgets: Mapping[str, int],
    stores: Mapping[str, int],
) -> Mapping[str, str] | None:
    """Keep as many layers as fit on the devices and rest the others in `stores`, filled in order.

    Layers are the units with KV; the last ones are offloaded, everything else stays. An offloaded
    layer runs on the main device (the first of `budgets` that holds anything): its KV lives there
    and the largest one's weights pass through there. stores: "cpu" and/or "disk" -> bytes. Returns
    None if nothing helps.
    """
    layers = [unit for unit in units if unit.kv] or sorted(units, key=lambda u: u.weights)
    devices = list(budgets)

    def with_offloaded(count: int) -> Mapping[str, str] | None:
        away = layers[len(layers) - count :]
        kept = [unit for unit in units if unit not in away]
        held = staged(away)
        rest = _fill([Unit(unit.name, unit.weights) for unit in away], stores, 0)
        if rest is None:
            return None
        for first, main in enumerate(devices):
            room = {device: budgets[device] for device in devices[first:]}
            room[main] -= held.weights + held.kv
            places = balance(kept, room) if room[main] >= 0 else None
            # a card too small to hold a unit is passed over, and the next one is the main device
            if places is not None and main in places.values():
                return {**places, **rest}
        return None

    # more offloaded layers need less on the devices but more in the stores: take the first that
    # fits
    for count in range(1, len(layers) + 1):
        fit = with_offloaded(count)
        if fit is not None:
            return fit
    return None
