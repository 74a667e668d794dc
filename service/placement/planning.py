"""From a model and a machine to a Placement; KV is reserved first."""

import importlib.util
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from typing import Any

from service.config.schema import ModelConfig
from service.config.suggesting import did_you_mean
from service.errors import DoesNotFit
from service.errors import PlacementMismatch
from service.errors import PlacementUnavailable
from service.placement import fitting
from service.placement import notes
from service.placement import overhead
from service.placement.hardware import Hardware
from service.placement.plan import DeviceMemory
from service.placement.plan import Placement
from service.placement.plan import Unit
from service.placement.plan import device_of
from service.placement.sizes import in_words

GIB = 2**30
# the shortest context that is offered instead
LEAST = 256


def on_one_device(
    config: ModelConfig,
    hardware: Hardware,
    device: str,
    change: Callable[[Any], Any] | None = None,
) -> Placement:
    """The whole model on one device, "cpu" or "cuda:N".

    change: gets the measured Footprint and returns the one to plan with, for a strategy whose
    `load` alters the model.

    Raises PlacementUnavailable if the device or bitsandbytes is missing, DoesNotFit with what
    would fit.
    """
    budget = budgets(config, hardware, [device])[device]
    need_quantizer(config)
    footprint = _measure(config, hardware, device)
    if change is not None:
        footprint = change(footprint)
    beside = sum(_overhead(config, footprint, [device]).values())
    if footprint.weights + footprint.kv + beside > budget:
        raise _does_not_fit(config, footprint, {device: budget - beside})
    return _placed(config, footprint, [device], {unit.name: device for unit in footprint.units})


def spread(config: ModelConfig, hardware: Hardware) -> Placement:
    """The model over all GPUs, or the CPU without one, with even room left on each.

    What does not fit is refused, or offloaded to RAM and disk where `on_no_fit` allows it.
    Raises DoesNotFit, PlacementUnavailable.
    """
    need_quantizer(config)
    names = [gpu.id for gpu in hardware.gpus] or ["cpu"]
    room = budgets(config, hardware, names)
    footprint = _measure(config, hardware, names[0])
    beside = sum(_overhead(config, footprint, names).values())
    room = {device: size - beside for device, size in room.items()}
    parts = [unit for unit in footprint.units if unit.name not in footprint.ties]
    places = fitting.balance(parts, room)
    if places is None and config.on_no_fit != "refuse":
        places = fitting.offload(parts, room, _stores(config, hardware, names))
    if places is None:
        raise _does_not_fit(config, footprint, room)
    return _placed(config, footprint, names, places)


def mapped(config: ModelConfig, hardware: Hardware, module_map: Mapping[str, str]) -> Placement:
    """The model where a map of yours says: for strategies with a placement of their own.

    module_map: module name -> "cuda:N", "cpu" or "disk"; a module without an entry is where its
    nearest parent is, "" is the whole model. Names are those of `modules`; one inside a layer
    splits it, and what it computes comes back to the layer's device. A tied head follows its
    embedding. On a machine with cards, what is mapped to "cpu" only rests there and runs on the
    first card of the map, as what is mapped to "disk" does.
    Raises PlacementMismatch (F10) for a name that the model does not have or a module without an
    entry, PlacementUnavailable (F19), DoesNotFit (F20) for the device that is too small.
    """
    need_quantizer(config)
    wanted = [device for device in dict.fromkeys(module_map.values()) if device != "disk"]
    cards = sorted((d for d in wanted if d != "cpu"), key=lambda d: int(d.rpartition(":")[2]))
    names = cards or ["cpu"]
    room = budgets(config, hardware, list(dict.fromkeys((*names, *wanted))))
    room["disk"] = _disk(config, hardware)
    footprint = _measure(config, hardware, names[0], apart=module_map)
    made = _placed(config, footprint, names, _expand(footprint, module_map))
    for device, memory in made.memory.items():
        if memory.total > room[device]:
            needs = f"{in_words(memory.weights)} of weights, {in_words(memory.kv)} of KV cache"
            raise DoesNotFit(
                f"{device} would need {needs} and {in_words(memory.overhead)} of overhead, and has "
                f"{in_words(room[device])} (F20)",
                hint=f"map less to {device}, or lower max_context or max_sequences",
                failure_class="F20",
            )
    return made


def modules(config: ModelConfig) -> tuple[str, ...]:
    """The name of every module of the model, in its order: what a map can name."""
    from service.placement import footprint

    hf_config = footprint.read_config(config)
    dtype = footprint.resolve_dtype(config, hf_config, on_cpu=True, native_bfloat16=True)
    model = footprint.skeleton(config, hf_config, dtype)
    return tuple(name for name, _ in model.named_modules() if name)


def units(config: ModelConfig, hardware: Hardware) -> tuple[Unit, ...]:
    """The parts of the model that are placed as a whole, in its order, with their bytes.

    Layers are the units with KV.
    """
    return tuple(_measure(config, hardware, hardware.gpus[0].id if hardware.gpus else "cpu").units)


def _expand(footprint: Any, module_map: Mapping[str, str]) -> dict[str, str]:
    """Unit -> device by whole dotted names, without tied ones. Raises PlacementMismatch (F10)."""
    from service.placement.tensors import listed

    names = [unit.name for unit in footprint.units]
    parents = {"", *names}
    for name in names:
        while name := name.rpartition(".")[0]:
            parents.add(name)
    unknown = [name for name in module_map if name not in parents]
    if unknown:
        meant = did_you_mean(unknown[0], parents)
        raise PlacementMismatch(
            f"the model has no module {listed(unknown)} to place{meant} (F10)",
            hint=f"it can be placed by {listed(names, 6)}",
            failure_class="F10",
            tensors=unknown,
        )
    places = {name: device_of(name, module_map) for name in names if name not in footprint.ties}
    lost = [name for name, device in places.items() if device is None]
    if lost:
        raise PlacementMismatch(
            f"the map has no device for {listed(lost)} (F10)",
            hint='add their entries, or "" for everything else',
            failure_class="F10",
            tensors=lost,
        )
    return {name: device for name, device in places.items() if device is not None}


def _placed(
    config: ModelConfig, footprint: Any, names: list[str], places: Mapping[str, str]
) -> Placement:
    """The Placement of a model whose units are where `places` says. names: devices that compute.

    Raises DoesNotFit when quantised weights would be offloaded.
    """
    module_map = dict(places)
    for follower, leader in footprint.ties.items():
        module_map[follower] = device_of(leader, module_map) or names[0]
    used = tuple(dict.fromkeys(d for d in (*names, "cpu", "disk") if d in module_map.values()))
    # the embedding is the first unit, and accelerate runs what is offloaded on the lowest card
    main = used[0]
    away = [unit for unit in footprint.units if module_map[unit.name] not in names]
    if away and config.quantize != "none":
        raise DoesNotFit(
            f"{len(away)} parts of {config.model_id} would be offloaded from {', '.join(names)}, "
            f"and weights quantised to {config.quantize} cannot be offloaded: bitsandbytes would "
            "leave them as they are (F13)",
            hint="lower max_context or max_sequences, or set quantize: none with offload",
            failure_class="F12",
        )
    held = fitting.staged(away)
    beside = _overhead(config, footprint, names)
    memory = {}
    for device in used:
        here = [unit for unit in footprint.units if module_map[unit.name] == device]
        runs = device in names
        parts = dict(beside) if runs else {}
        if device == main and held.weights:
            parts["passing"] = held.weights
        memory[device] = DeviceMemory(
            sum(unit.weights for unit in here),
            (sum(unit.kv for unit in here) if runs else 0) + (held.kv if device == main else 0),
            sum(parts.values()),
            parts,
        )
    resting = {d: m.weights for d, m in memory.items() if d not in names}
    whole = set(module_map.values()) == {main}
    device_map = {name: _torch_key(device) for name, device in module_map.items()}
    return Placement(
        devices=used,
        module_map={"": main} if whole else module_map,
        memory=memory,
        load_kwargs=load_kwargs(
            config, footprint.dtype, {"": _torch_key(main)} if whole else device_map, footprint.keep
        ),
        main_device=main,
        allows=frozenset({"offload"}) if away else frozenset(),
        quantized=footprint.quantized,
        kv_bytes_per_token=footprint.kv_bytes_per_token,
        kv_tokens=footprint.kv_tokens,
        parameters=footprint.parameters,
        dtype=footprint.dtype,
        context=footprint.context,
        units=footprint.units,
        notes=(
            *notes.about_context(config, footprint.context),
            *notes.about_files(config, footprint),
            *notes.about_kv(footprint),
            *notes.about_embeddings(config, footprint),
            *notes.about_path(footprint),
            *notes.about_offload(resting, footprint.weights),
        ),
    )


def _does_not_fit(config: ModelConfig, footprint: Any, room: Mapping[str, int]) -> DoesNotFit:
    """The error of a model that is too large (F20). room: device -> bytes for weights and KV."""
    have = sum(room.values())
    short = footprint.weights + footprint.kv - have
    needs = f"{in_words(footprint.weights)} of weights and {in_words(footprint.kv)} of KV cache"
    see = f"see: moorage plan --deployment {config.deployment}"
    return DoesNotFit(
        f"{config.model_id} needs {needs}; {' and '.join(room)} can take {in_words(max(have, 0))} "
        f"beside the overhead, {in_words(max(short, 0))} short (F20)",
        hint=f"{_would_fit(config, footprint, have)}; {see}",
        failure_class="F20",
    )


def load_kwargs(
    config: ModelConfig, dtype: str, device_map: Mapping[str, Any], keep: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What `from_pretrained` gets: safe formats, local files, our own device map.

    keep: modules that must not be quantised; empty: those that transformers keeps itself.
    """
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "device_map": dict(device_map),
        "local_files_only": True,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.gguf_file is not None:
        kwargs["gguf_file"] = config.gguf_file
    elif not config.allow_pickle:
        kwargs["use_safetensors"] = True
    rests = any(device in ("cpu", "disk") for device in device_map.values())
    if rests and len(device_map) > 1 and config.offload_folder is not None:
        kwargs["offload_folder"] = str(config.offload_folder)
    if config.quantize != "none":
        kwargs["quantization_config"] = quantization(config.quantize, dtype, keep)
    return kwargs


def quantization(quantize: str, dtype: str, keep: tuple[str, ...] = ()) -> Any:
    """bitsandbytes' settings for one of our names; products are computed in `dtype`."""
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(keep) or None)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=list(keep) or None,  # of 4-bit formats, too
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def need_quantizer(config: ModelConfig) -> None:
    """Raise PlacementUnavailable if `quantize` needs a package that is not installed, or cpu."""
    if config.quantize == "int4":
        raise PlacementUnavailable(
            f"strategy {config.strategy} cannot do quantize: int4, a format of strategy cpu",
            hint="use quantize: nf4, which is as small, or strategy: cpu",
        )
    if config.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise PlacementUnavailable(
            f"quantize: {config.quantize} needs bitsandbytes, which is not installed.",
            hint="pip install 'moorage[bnb]'",
        )


def budgets(config: ModelConfig, hardware: Hardware, devices: list[str]) -> dict[str, int]:
    """Bytes the deployment may use per device: what is free, less `keep_free`, at most
    `max_memory`.

    Raises PlacementUnavailable (F19) for a device that is not there.
    """
    free = {gpu.id: gpu.free_bytes for gpu in hardware.gpus} | {"cpu": hardware.cpu.free_bytes}
    room: dict[str, int] = {}
    for device in devices:
        if device not in free:
            have = ", ".join(gpu.id for gpu in hardware.gpus)
            raise PlacementUnavailable(
                f"strategy {config.strategy} needs {device}, but "
                + (
                    f"this machine has {have} only (F19)"
                    if have
                    else "there is no accelerator (F19)"
                ),
                hint="use strategy: cpu, or strategy: auto-shard, which takes what is there",
                failure_class="F19",
            )
        kind = device.partition(":")[0]
        keep = config.keep_free.get(device, config.keep_free.get(kind, 0))
        room[device] = min(free[device] - keep, config.max_memory.get(device, free[device]))
    return room


def _measure(
    config: ModelConfig, hardware: Hardware, device: str, apart: Collection[str] = ()
) -> Any:
    from service.placement import footprint

    cpu = hardware.cpu
    return footprint.measure(
        config,
        on_cpu=device == "cpu",
        native_bfloat16=cpu.bfloat16,
        threads=cpu.cores,
        apart=apart,
    )


def _stores(config: ModelConfig, hardware: Hardware, names: list[str]) -> dict[str, int]:
    """Where offloaded weights may rest, RAM before disk (F11)."""
    stores: dict[str, int] = {}
    if "cpu" not in names:
        stores.update(budgets(config, hardware, ["cpu"]))
    if config.on_no_fit == "offload-disk":
        stores["disk"] = _disk(config, hardware)
    return stores


def _disk(config: ModelConfig, hardware: Hardware) -> int:
    free = hardware.disk_free_bytes - config.keep_free.get("disk", 0)
    return min(free, config.max_memory.get("disk", free))


def _overhead(config: ModelConfig, footprint: Any, names: list[str]) -> dict[str, int]:
    """The parts of the overhead of each of the devices that compute."""
    resident = (footprint.weights + footprint.kv) // len(names)
    return overhead.parts(
        footprint,
        resident,
        whole=len(names) == 1,
        on_cuda=footprint.on_cuda,
        compiled=config.compile,
    )


def _would_fit(config: ModelConfig, footprint: Any, budget: int) -> str:
    """What would fit if only the KV were smaller: "fits 1 x 8192 or 4 x 2048 tokens"."""
    left = budget - footprint.weights
    context = footprint.context
    while context > LEAST and footprint.kv_of(context, 1) > left:
        context = max(LEAST, context // 2)
    if footprint.kv_of(context, 1) > left:
        smaller = ", or quantize: nf4 where most of them are in linear layers"
        return (
            "the weights alone fill it: choose another strategy or a smaller model"
            f"{smaller if config.quantize == 'none' else ''}"
        )
    short = min(context, max(LEAST, context // 4))
    return (
        f"it fits max_sequences {_most(footprint, context, left)} x max_context {context}, "
        f"or {_most(footprint, short, left)} x {short}"
    )


def _most(footprint: Any, context: int, left: int) -> int:
    """The most sequences whose KV fits into `left` bytes, one or more."""
    one, two = footprint.kv_of(context, 1), footprint.kv_of(context, 2)
    return 1 + max(0, (left - one) // (two - one)) if two > one else 1


def _torch_key(device: str) -> str | int:
    """accelerate takes accelerators as numbers; with strings its main device is random (F22)."""
    return int(device.partition(":")[2]) if device.startswith("cuda:") else device
