"""A placement as data: which device a name is on, and its modules in short."""

from service.placement.plan import DeviceMemory
from service.placement.plan import ModuleGroup
from service.placement.plan import Placement
from service.placement.plan import Unit
from service.placement.plan import device_of
from service.placement.plan import groups

MAP = {"": "cpu", "model.layers.1": "cuda:0", "model.layers.1.mlp": "disk"}


def test_a_name_is_where_its_nearest_entry_says():
    assert device_of("model.layers.1.self_attn.q_proj.weight", MAP) == "cuda:0"
    assert device_of("model.layers.1.mlp.up_proj.weight", MAP) == "disk"
    assert device_of("model.layers.1", MAP) == "cuda:0"
    assert device_of("lm_head.weight", MAP) == "cpu"


def test_layer_10_is_not_part_of_layer_1():
    """accelerate matches prefixes (F9)."""
    assert device_of("model.layers.10.mlp.up_proj.weight", MAP) == "cpu"


def test_a_name_without_an_entry_is_nowhere():
    assert device_of("lm_head.weight", {"model": "cpu"}) is None
    assert device_of("lm_head.weight", {}) is None


def placement() -> Placement:
    names = ["embed", *(f"layers.{i}" for i in range(12)), "norm"]
    places = dict.fromkeys(names[:6], "cuda:0") | dict.fromkeys(names[6:], "cuda:1")
    return Placement(
        devices=("cuda:0", "cuda:1", "disk"),
        module_map=places,
        memory={
            "cuda:0": DeviceMemory(weights=60, kv=5, overhead=1),
            "cuda:1": DeviceMemory(weights=80, kv=7, overhead=1),
        },
        units=tuple(Unit(name, 10, 1) for name in names),
    )


def test_neighbours_on_one_device_are_written_as_one():
    assert groups(placement()) == {
        "cuda:0": [
            ModuleGroup("embed", (Unit("embed", 10, 1),)),
            ModuleGroup("layers.0-4", tuple(Unit(f"layers.{i}", 10, 1) for i in range(5))),
        ],
        "cuda:1": [
            ModuleGroup("layers.5-11", tuple(Unit(f"layers.{i}", 10, 1) for i in range(5, 12))),
            ModuleGroup("norm", (Unit("norm", 10, 1),)),
        ],
        "disk": [],
    }
    layers = groups(placement())["cuda:0"][1]
    assert (layers.count, layers.bytes) == (5, 50)


def test_a_gap_in_the_numbers_is_not_written_over():
    two = Placement(
        devices=("cpu",),
        module_map={"": "cpu"},
        units=(Unit("layers.0", 1), Unit("layers.2", 1), Unit("other.3", 1)),
    )
    assert [group.name for group in groups(two)["cpu"]] == ["layers.0", "layers.2", "other.3"]
