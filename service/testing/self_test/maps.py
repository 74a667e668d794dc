"""Maps that say other than was meant, and memory that was not counted: F8-F12, F19, F20, F22."""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import accelerate.big_modeling
import torch
from accelerate import infer_auto_device_map
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel
from transformers.integrations.accelerate import expand_device_map

from service.placement import planning
from service.placement.certificate import certify
from service.placement.hardware import invent
from service.placement.plan import Placement
from service.testing.placing import CPU_PARTS
from service.testing.placing import ROOMY
from service.testing.placing import bring_up
from service.testing.placing import built_in
from service.testing.placing import config_of
from service.testing.placing import dispatched
from service.testing.placing import judged
from service.testing.placing import logits
from service.testing.placing import planned
from service.testing.placing import variant
from service.testing.self_test.outcome import raises
from service.testing.self_test.outcome import refused
from service.testing.tiny import tiny_config

APART = {**CPU_PARTS, "lm_head": "disk"}
# its second key also begins the names of layers 10 and 11
BEGINS_ALIKE = {"": "cpu", "model.layers.1": "disk"}
INCOMPLETE = {
    **{name: place for name, place in CPU_PARTS.items() if name != "model.layers"},
    "model.layers.0": "cpu",
}
ONE_CARD = invent("24GiB,ram=64GiB,disk=1TiB")
TWO_CARDS = invent("2x24GiB")
GPU_OF_150_KB: dict[int | str, int | str] = {0: 150_000}
# a KV cache of several times a tiny model's weights
BUSY = {"max_context": 512, "max_sequences": 64}


def silently_offloaded(folder: Path) -> PreTrainedModel:
    """A model that "auto" put on the disk as a whole (F12)."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": 200_000},
        offload_folder=config_of(folder).offload_folder,
    )
    return model


def planned_by_names(module_map: Mapping[str, str], **changes: Any) -> Any:
    """A `plan` hook whose map is `module_map`, as somebody would write it by hand."""

    def plan(config: Any, hardware: Any) -> Placement:
        placement = built_in().select("cpu").plan(config, hardware)
        return replace(placement, module_map=module_map, **changes)

    return plan


def card_too_small(folder: Path, short: int = 40_000) -> dict[str, int]:
    """A `max_memory` that says nothing of RAM, for ONE_CARD: so many bytes short of the model."""
    return {"cuda:0": planned(folder, "single-gpu", ONE_CARD).memory["cuda:0"].total - short}


def cards_of_two_thirds(folder: Path) -> dict[str, int]:
    """A `max_memory` for TWO_CARDS, of which neither can hold more than most of the model."""
    whole = planned(folder, "single-gpu", ONE_CARD).memory["cuda:0"]
    size = whole.overhead + (whole.weights + whole.kv) * 2 // 3
    return {"cuda:0": size, "cuda:1": size}


def layers_away(model: PreTrainedModel) -> set[int]:
    """Numbers of the layers that are not in RAM."""
    names = [name.split(".") for name, tensor in model.named_parameters() if tensor.is_meta]
    return {int(parts[2]) for parts in names if parts[1] == "layers"}


def weights_without_kv(folder: Path) -> int:
    """Bytes of RAM that hold the weights, and a tenth more, and no KV for BUSY (F20)."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    size: int = sum(p.numel() * p.element_size() for p in model.parameters())
    return size * 11 // 10


def main_devices(pairs: Sequence[tuple[Any, Any]]) -> list[Any]:
    """The main device accelerate chooses for a map over each pair of devices and the CPU (F22)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with _dispatching_nothing() as chosen:
        for first, second in pairs:
            places = {
                "model.embed_tokens": first,
                "model.layers.0": first,
                "model.layers.1": "cpu",
                "model.norm": second,
                "model.rotary_emb": first,
                "lm_head": second,
            }
            accelerate.big_modeling.dispatch_model(model, places, state_dict={}, force_hooks=True)
    return chosen


@contextmanager
def _dispatching_nothing() -> Iterator[list[Any]]:
    """Let `dispatch_model` choose and not attach anything, which needs the devices."""
    module: Any = accelerate.big_modeling
    names = ("attach_align_device_hook_on_blocks", "check_cuda_p2p_ib_support")
    originals = {name: getattr(module, name) for name in names}
    chosen: list[Any] = []

    def attach(model: Any, execution_device: Any, **kwargs: Any) -> None:
        chosen.append(execution_device[""])

    module.attach_align_device_hook_on_blocks = attach
    module.check_cuda_p2p_ib_support = lambda: True
    try:
        yield chosen
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


NUMBERS = [(i, j) for i in range(8) for j in range(i + 1, 8)]
NAMES = [(f"cuda:{i}", f"cuda:{j}") for i, j in NUMBERS]


# --- the trials


def tied_pair_apart(folder: Path) -> tuple[bool, bool | None]:
    model = dispatched(folder, {"lm_head": "disk"})
    if not raises(lambda: logits(model)):
        return False, None
    return True, "F8" in refused(lambda: judged(model, folder))


def key_that_begins_alike(folder: Path) -> tuple[bool, bool]:
    """transformers looks a weight's device up so; ours carries the map out as it is written."""
    names = [f"model.layers.{number}.mlp.down_proj.weight" for number in range(12)]
    found = expand_device_map(dict(BEGINS_ALIKE), names)
    there = [number for number, name in enumerate(names) if found[name] == "disk"] != [1]
    loaded = bring_up(folder, variant(plan=_mapped(BEGINS_ALIKE)))
    return there, layers_away(loaded.model) == {1} and certify(loaded).valid


def _mapped(module_map: Mapping[str, str]) -> Any:
    return lambda config, hardware: planning.mapped(config, hardware, module_map)


def incomplete_map(folder: Path) -> tuple[bool, bool]:
    load = AutoModelForCausalLM.from_pretrained
    there = not raises(lambda: load(folder, device_map=dict(INCOMPLETE)))
    typo = {"": "cpu", "model.embed_token": "cpu"}
    caught = [
        "F10" in refused(partial(planning.mapped, config_of(folder), ROOMY, places))
        for places in (INCOMPLETE, typo)
    ]
    return there, all(caught)


def memory_without_cpu(folder: Path) -> tuple[bool, bool]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    there = set(infer_auto_device_map(model, max_memory=dict(GPU_OF_150_KB)).values())
    ours = planned(
        folder, "auto-shard", ONE_CARD, on_no_fit="offload-disk", max_memory=card_too_small(folder)
    )
    return "disk" in there and "cpu" not in there, ours.devices == ("cuda:0", "cpu")


def silent_offload(folder: Path) -> tuple[bool, bool | None]:
    model = silently_offloaded(folder)
    if not all(parameter.is_meta for parameter in model.parameters()):
        return False, None
    return True, "F12" in refused(lambda: judged(model, folder))


def device_not_there(folder: Path) -> tuple[bool, bool]:
    """With a device of which every machine has none that computes; ours plans without a GPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="meta")
    there = all(parameter.is_meta for parameter in model.parameters())
    return there, "F19" in refused(lambda: planned(folder, "single-gpu", ROOMY))


def weights_only(folder: Path) -> tuple[bool, bool]:
    limit = weights_without_kv(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": limit}, offload_folder=folder.parent / "plain"
    )
    there = not any(parameter.is_meta for parameter in model.parameters())
    keys: dict[str, Any] = {**BUSY, "max_memory": {"cpu": limit}}
    return there, "F20" in refused(lambda: planned(folder, "cpu", **keys))


def random_main_device(folder: Path) -> tuple[bool, bool]:
    there = main_devices(NAMES) != [first for first, _ in NAMES]
    ours = planned(folder, "auto-shard", TWO_CARDS, max_memory=cards_of_two_thirds(folder))
    numbered = set(ours.load_kwargs["device_map"].values()) == {0, 1}
    first = main_devices(NUMBERS) == [number for number, _ in NUMBERS]
    return there, numbered and first and ours.main_device == "cuda:0"
