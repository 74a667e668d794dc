"""What the certificate checks, one function per failure class.

Each returns how many things it looked at and raises PlacementMismatch, naming tensors and the way
out.
"""

import math
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import torch

from service.errors import PlacementMismatch
from service.placement import checks_values
from service.placement import guard
from service.placement import heads
from service.placement import stored
from service.placement import traced
from service.placement.inputs import input_device
from service.placement.inputs import place
from service.placement.loading import Loaded
from service.placement.loading import check_keys
from service.placement.plan import Placement
from service.placement.plan import device_of
from service.placement.tensors import Owner
from service.placement.tensors import listed
from service.placement.tensors import named_tensors
from service.placement.tensors import nbytes
from service.placement.tensors import offload_owners
from service.placement.tensors import own_scales
from service.placement.tensors import scales_of
from service.placement.tensors import stored_on

QUANTIZED_LINEARS = ("Linear4bit", "Linear8bitLt", "Int8Linear", "Int4Linear")

# torchao leaves the layer as it is
QUANTIZED_WEIGHTS = ("Int8Tensor",)

CheckFunction = Callable[[Loaded, Mapping[str, Owner]], int]


def parameters_exist(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """F1: a parameter on meta must be owned by an offload hook whose map has its real value."""
    parameters = list(loaded.model.named_parameters(remove_duplicate=False))
    _materialised(loaded, owners, parameters, "F1", "never materialised")
    return len(parameters)


def buffers_exist(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """F2: the same for buffers, which no checkpoint lists when they are not persistent."""
    buffers = list(loaded.model.named_buffers(remove_duplicate=False))
    fact = "in no checkpoint and never computed"
    _materialised(loaded, owners, buffers, "F2", fact)
    return len(buffers)


def _materialised(
    loaded: Loaded,
    owners: Mapping[str, Owner],
    tensors: list[tuple[str, Any]],
    failure_class: str,
    fact: str,
) -> None:
    lost = [(n, t) for n, t in tensors if t.device.type == "meta" and not _stored(owners.get(n), t)]
    if not lost:
        return
    names = [name for name, _ in lost]
    size = sum(nbytes(tensor) for _, tensor in lost)
    were = "was" if len(names) == 1 else "were"
    raise PlacementMismatch(
        f"{listed(names)} {were} left on meta ({failure_class}): {fact} ({size:,} bytes). "
        f"Strategy {loaded.strategy.name} must materialise every tensor or offload it with a hook.",
        hint=f"lower max_context, set quantize: nf4, or allow on_no_fit: offload-cpu. "
        f"See: moorage plan --deployment {loaded.config.deployment}",
        failure_class=failure_class,
        tensors=names,
    )


def _stored(owner: Owner | None, tensor: torch.Tensor) -> bool:
    found = stored.find(owner) if owner is not None else None
    return found is not None and math.prod(found.shape) == tensor.numel()


def globals_pristine(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """F4: nothing that loaders swap is left swapped."""
    names = guard.findings()
    if names:
        raise PlacementMismatch(
            f"another load overlapped: {listed(names)} is swapped out (F4)",
            hint="load models through Moorage only",
            failure_class="F4",
        )
    return guard.watched_count()


def inputs_have_a_device(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """F7: it is known where inputs belong, and it is where the plan said."""
    device = input_device(loaded.model, loaded.placement.main_device)
    planned = loaded.placement.main_device
    if planned is not None and torch.device(planned) != device:
        raise PlacementMismatch(
            f"inputs belong on {device} but the plan says {planned} (F7); "
            f"model.device says {loaded.model.device}",
            hint="the strategy's load and plan disagree about the input embedding",
            failure_class="F7",
        )
    return 1


def ties_hold(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """F8: both ends of a tied pair on one device, and reachable when offloaded."""
    tensors = dict(named_tensors(loaded.model))
    pairs = dict(getattr(loaded.model, "all_tied_weights_keys", None) or {})
    for name, other in pairs.items():
        if name not in tensors or other not in tensors:
            continue  # a quantiser may have replaced one end
        places = [_place(key, tensors[key], owners) for key in (name, other)]
        if places[0] == places[1] and None not in places:
            continue
        where = " and ".join(
            f"{key} is {'nowhere' if place is None else f'on {place}'}"
            for key, place in zip((name, other), places, strict=True)
        )
        raise PlacementMismatch(
            f"tied weights are apart: {where} (F8)",
            hint=f"map {name.rpartition('.')[0]} and {other.rpartition('.')[0]} to one device",
            failure_class="F8",
            tensors=[name, other],
        )
    return len(pairs)


def _place(name: str, tensor: torch.Tensor, owners: Mapping[str, Owner]) -> str | None:
    """The device a tensor rests on, "... (offloaded)" if a hook owns it, None if it is nowhere.

    What a hook owns it fetches before every forward, also where the tensor itself is not on meta:
    a tied head whose embedding stayed in RAM has no entry in its hook's map.
    """
    owner = owners.get(name)
    if owner is not None:
        return f"{stored_on(owner)} (offloaded)" if _stored(owner, tensor) else None
    return None if tensor.device.type == "meta" else str(tensor.device)


def offload_intended(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """F12: only devices the plan names, and offload only if the strategy declared it."""
    found = device_bytes(loaded, owners)
    total = sum(found.values()) or 1
    away = sum(nbytes(t) for n, t in named_tensors(loaded.model) if t.device.type == "meta")
    if away and "offload" not in loaded.placement.allows:
        raise PlacementMismatch(
            f"{away:,} bytes ({away / total:.0%} of the weights) are offloaded and the plan does "
            "not say so (F12); every token would wait for them to be copied",
            hint="set on_no_fit: offload-cpu or offload-disk if that is meant, or see moorage plan",
            failure_class="F12",
            tensors=[n for n, t in loaded.model.named_parameters() if t.device.type == "meta"],
        )
    planned = set(loaded.placement.devices)
    extra = {device: size for device, size in found.items() if planned and device not in planned}
    if extra:
        facts = ", ".join(f"{size:,} bytes on {device}" for device, size in extra.items())
        raise PlacementMismatch(
            f"{facts}, but the plan uses {', '.join(loaded.placement.devices)} only (F12)",
            hint="the strategy's load and plan disagree",
            failure_class="F12",
            tensors=[n for n, t in named_tensors(loaded.model) if str(t.device) in extra],
        )
    return len(found)


def quantized_as_asked(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """F13: as many linears are quantised as were planned; `is_loaded_in_4bit` proves nothing."""
    asked = loaded.config.quantize
    linears = quantized_linears(loaded)
    planned = loaded.placement.quantized
    if asked == "none":
        if linears and planned is not None and len(linears) != planned:
            raise PlacementMismatch(
                f"quantize is none, but {len(linears)} linears are quantised (F13); "
                f"{planned} were planned",
                hint="set quantize, or let the strategy's plan say what it quantises",
                failure_class="F13",
                tensors=[f"{name}.weight" for name in linears],
            )
        return len(linears)
    if not linears or (planned is not None and len(linears) != planned):
        of = planned if planned else "all"
        raise PlacementMismatch(
            f"asked for {asked}: {len(linears)} of {of} linears are quantised (F13)",
            hint="the quantisation config skips modules, or part of the model is offloaded",
            failure_class="F13",
            tensors=_plain_linears(loaded),
        )
    return len(linears)


def quantized_can_run(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """F14: every quantised layer has its scales, on its own device."""
    linears = quantized_linears(loaded)
    for name, module in linears.items():
        weight = module.weight
        scales = scales_of(module) or own_scales(module)
        if not scales or any(tensor.device != weight.device for tensor in scales):
            where = f"scales on {scales[0].device}" if scales else "no scales"
            raise PlacementMismatch(
                f"{name} is quantised and has {where}, its weight is on {weight.device} (F14)",
                hint="the layer's input size must be a multiple of the block size (64)",
                failure_class="F14",
                tensors=[f"{name}.weight"],
            )
    return len(linears)


def keys_match(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """F15: the checkpoint has every tensor of the model and no other, but for an encoder's head."""
    check_keys(list(loaded.keys), loaded.placement.allows | heads.spare(loaded.model))
    return sum(1 for _ in loaded.model.state_dict())


def strategy_agrees(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """The strategy's own `validate`."""
    loaded.strategy.validate(loaded.model, loaded.placement)
    return 1


def inputs_are_placed(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """`place_inputs` keeps everything but the device, which is the right one."""
    sample = sample_inputs(loaded)
    copies = {name: tensor.clone() for name, tensor in sample.items()}
    handed = dict(sample)
    who = f"strategy {loaded.strategy.name}: place_inputs"
    placed = place(loaded.strategy.place_inputs, loaded.model, handed, who)
    expected = input_device(loaded.model, loaded.placement.main_device)
    for name, tensor in placed.items():
        before = copies[name]
        if handed.get(name) is not sample[name] or not torch.equal(sample[name], before):
            raise PlacementMismatch(f"{who} changed its argument {name}")
        if tensor.device != expected:
            raise PlacementMismatch(
                f"{who} put {name} on {tensor.device}; inputs belong on {expected} (F7); "
                f"model.device says {loaded.model.device}",
                hint="return service.placement.inputs.to_input_device(model, inputs)",
                failure_class="F7",
            )
        if not torch.equal(tensor.cpu(), before):
            raise PlacementMismatch(f"{who} changed the values of {name}")
    return len(placed)


def forward_is_sound(loaded: Loaded, owners: Mapping[str, Owner]) -> int:
    """One traced forward: no operator touches meta or mixes devices, and the logits are finite.

    A model without a head gives hidden states, of any size.
    """
    ids = sample_inputs(loaded)
    placed = place(loaded.strategy.place_inputs, loaded.model, ids)
    logits, operators = traced.forward(loaded.model, placed)
    headless = loaded.model.get_output_embeddings() is None
    vocabulary = 1 if headless else loaded.model.config.get_text_config().vocab_size
    if logits.shape[:2] != ids["input_ids"].shape or logits.shape[-1] < vocabulary:
        raise PlacementMismatch(
            f"logits have shape {tuple(logits.shape)}; "
            f"expected {(*ids['input_ids'].shape, vocabulary)}"
        )
    if not torch.isfinite(logits).all():
        raise PlacementMismatch(
            "the first forward gives NaN or infinite logits: the weights in the files are damaged",
            hint="compare the files' checksums with the publisher's, or use dtype: float32",
            failure_class="F16",
        )
    return operators


# in the order they run
CHECKS: tuple[tuple[str, CheckFunction], ...] = (
    ("F1", parameters_exist),
    ("F2", buffers_exist),
    ("F3", checks_values.buffers_computed),
    ("F4", globals_pristine),
    ("F7", inputs_have_a_device),
    ("F8", ties_hold),
    ("F12", offload_intended),
    ("F13", quantized_as_asked),
    ("F14", quantized_can_run),
    ("F15", keys_match),
    ("F16", checks_values.values_are_the_files),
    ("strategy", strategy_agrees),
    ("inputs", inputs_are_placed),
    ("forward", forward_is_sound),
)


def placed_as_planned(model: Any, placement: Placement) -> None:
    """Raise PlacementMismatch unless every tensor is where `placement.module_map` puts it.

    For the `validate` of a strategy. An offloaded tensor counts as being where it rests. A tensor
    that a quantiser added is judged by its module. A buffer of an offloaded module runs on the
    main device, where accelerate keeps it.
    """
    if not placement.module_map:
        return
    owners = offload_owners(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wrong: list[str] = []
    fact = ""
    for name, tensor in named_tensors(model):
        planned = device_of(name, placement.module_map)
        if planned is None:
            raise PlacementMismatch(
                f"{name} is in no entry of the plan's module map (F10)",
                hint='add its module, or "" for everything else',
                failure_class="F10",
                tensors=[name],
            )
        actual = _resting(name, tensor, owners)
        moved = planned in ("cpu", "disk") and planned != placement.main_device
        buffer = moved and actual == placement.main_device and name not in parameters
        if actual != planned and not buffer:
            wrong.append(name)
            fact = fact or f"{name} is on {actual}, planned on {planned}"
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise PlacementMismatch(
            f"{fact}{more}",
            hint="the load did not follow the plan; see moorage plan",
            tensors=wrong,
        )


def _resting(name: str, tensor: torch.Tensor, owners: Mapping[str, Owner]) -> str:
    if tensor.device.type == "meta" and name in owners:
        return stored_on(owners[name])
    return str(tensor.device)


# --- facts the checks share


def sample_inputs(loaded: Loaded) -> dict[str, torch.Tensor]:
    """A few valid token ids, int64 [1, 4] on CPU; for an encoder and for a decoder, if there is one
    of each.
    """
    config = loaded.model.config
    ids = torch.arange(4, dtype=torch.int64)[None] % config.get_text_config().vocab_size
    return {
        "input_ids": ids,
        **({"decoder_input_ids": ids.clone()} if config.is_encoder_decoder else {}),
    }


def device_bytes(loaded: Loaded, owners: Mapping[str, Owner]) -> dict[str, int]:
    """Bytes per device: tied tensors once, offloaded ones where they rest."""
    sizes: dict[str, int] = {}
    scales = [(name, t) for name, m in quantized_linears(loaded).items() for t in scales_of(m)]
    tensors = (*loaded.model.named_parameters(), *loaded.model.named_buffers(), *scales)
    for name, tensor in tensors:
        place = _resting(name, tensor, owners)
        sizes[place] = sizes.get(place, 0) + nbytes(tensor)
    return sizes


def quantized_linears(loaded: Loaded) -> dict[str, Any]:
    """Linear layers by name that bitsandbytes or we have replaced, or whose weight is torchao's."""
    return {
        name: module
        for name, module in loaded.model.named_modules()
        if type(module).__name__ in QUANTIZED_LINEARS
        or type(getattr(module, "weight", None)).__name__ in QUANTIZED_WEIGHTS
    }


def _plain_linears(loaded: Loaded) -> list[str]:
    quantized = quantized_linears(loaded)
    return [
        f"{name}.weight"
        for name, module in loaded.model.named_modules()
        if type(module) is torch.nn.Linear and name not in quantized
    ]
