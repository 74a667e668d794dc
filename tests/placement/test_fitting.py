"""Which unit goes where: the best cut there is, and the fewest layers away from the devices."""

import itertools
from collections.abc import Mapping
from collections.abc import Sequence

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from service.placement import fitting
from service.placement.plan import Unit
from tests.support.planned import MIB

SIZES = st.integers(0, 40)


def units_of(sizes: Sequence[tuple[int, int]]) -> list[Unit]:
    """Units from (weights, KV) in MiB."""
    return [Unit(f"u{i}", w * MIB, kv * MIB) for i, (w, kv) in enumerate(sizes)]


def least_left(places: Mapping[str, str], units: Sequence[Unit], room: Mapping[str, int]) -> float:
    """The least room left on a device that is used."""
    left = dict(room)
    for unit in units:
        left[places[unit.name]] -= unit.weights + unit.kv
    return min((left[device] for device in set(places.values())), default=float("inf"))


def best_by_trying_all(units: Sequence[Unit], room: Mapping[str, int]) -> float | None:
    """The largest least room left over all cuts into one run per device, in order; None: no fit."""
    best: float | None = None
    for cut in itertools.combinations_with_replacement(range(len(room)), len(units)):
        places = {u.name: list(room)[d] for u, d in zip(units, cut, strict=True)}
        left = least_left(places, units, room)
        if left >= 0 and (best is None or left > best):
            best = left
    return best


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=6),
    st.lists(st.integers(0, 150), min_size=1, max_size=3),
)
def test_balance_is_the_best_cut_there_is(sizes: list[tuple[int, int]], budgets: list[int]):
    units = units_of(sizes)
    room = {f"cuda:{i}": size * MIB for i, size in enumerate(budgets)}
    best = best_by_trying_all(units, room)
    found = fitting.balance(units, room)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert list(found) == [unit.name for unit in units]
    used = [list(room).index(device) for device in found.values()]
    assert used == sorted(used), "one run per device, in their order"
    assert least_left(found, units, room) >= best - MIB, "to within a MiB"


def test_kv_stays_with_its_layer():
    """By weights alone all three would fit the first device."""
    units = units_of([(10, 30), (10, 30), (10, 30)])
    assert fitting.balance(units, {"cuda:0": 80 * MIB, "cuda:1": 80 * MIB}) == {
        "u0": "cuda:0",
        "u1": "cuda:0",
        "u2": "cuda:1",
    }


def test_a_device_too_small_for_the_first_unit_is_passed_over():
    assert fitting.balance(units_of([(10, 0)]), {"cuda:0": MIB, "cuda:1": 20 * MIB}) == {
        "u0": "cuda:1"
    }


def test_nothing_to_place_is_placed_and_nowhere_to_place_is_not():
    assert fitting.balance([], {"cuda:0": MIB}) == {}
    assert fitting.balance(units_of([(1, 0)]), {}) is None


# --- offload

# an embedding, six layers of 10 + 2, a head
MODEL = [(20, 0), *[(10, 2)] * 6, (20, 0)]
LAYERS = [f"u{i}" for i in range(1, 7)]


def away(fit: Mapping[str, str]) -> list[str]:
    return [name for name, device in fit.items() if not device.startswith("cuda")]


def held(fit: Mapping[str, str]) -> Unit:
    return fitting.staged(unit for unit in units_of(MODEL) if unit.name in away(fit))


def test_the_fewest_layers_are_offloaded_and_they_are_the_last():
    """Kept: 40 + n x 12; set aside: one layer's weights, and 2 of KV for each of the others."""
    for count in range(1, 7):
        need = 40 + (6 - count) * 12 + 10 + count * 2
        fit = fitting.offload(units_of(MODEL), {"cuda:0": need * MIB}, {"cpu": 999 * MIB})
        assert fit is not None
        assert away(fit) == LAYERS[6 - count :]


def test_an_offloaded_layers_kv_and_one_layers_weights_are_kept_free_on_the_main_device():
    fit = fitting.offload(units_of(MODEL), {"cuda:0": 100 * MIB}, {"cpu": 999 * MIB})
    assert fit is not None
    assert held(fit).weights == 10 * MIB
    assert held(fit).kv == len(away(fit)) * 2 * MIB
    kept = sum(u.weights + u.kv for u in units_of(MODEL) if u.name not in away(fit))
    assert kept + held(fit).weights + held(fit).kv <= 100 * MIB


def test_ram_is_filled_before_the_disk():
    fit = fitting.offload(
        units_of(MODEL), {"cuda:0": 80 * MIB}, {"cpu": 25 * MIB, "disk": 999 * MIB}
    )
    assert fit is not None
    rest = [fit[name] for name in away(fit)]
    assert rest == ["cpu"] * 2 + ["disk"] * (len(rest) - 2)
    assert len(rest) > 2


def test_stores_that_are_full_help_nobody():
    assert fitting.offload(units_of(MODEL), {"cuda:0": 80 * MIB}, {"cpu": 5 * MIB}) is None
    assert fitting.offload(units_of(MODEL), {"cuda:0": 80 * MIB}, {}) is None


def test_what_cannot_be_offloaded_must_fit():
    """Embedding and head need 40."""
    assert fitting.offload(units_of(MODEL), {"cuda:0": 39 * MIB}, {"cpu": 999 * MIB}) is None


def test_layers_are_staged_on_a_device_that_holds_something():
    """accelerate runs offloaded layers on the first card in use, not on one that is too small."""
    fit = fitting.offload(
        units_of(MODEL), {"cuda:0": 15 * MIB, "cuda:1": 100 * MIB}, {"cpu": 999 * MIB}
    )
    assert fit is not None
    assert set(fit.values()) == {"cuda:1", "cpu"}
    kept = sum(u.weights + u.kv for u in units_of(MODEL) if u.name not in away(fit))
    assert kept + held(fit).weights + held(fit).kv <= 100 * MIB
