"""Run plans on a pretended machine: one JSON object a line in, one out. See `simulation.simulate`.

Runs in a process of its own (python -m service.testing.simulated): what it does to torch cannot be
undone.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from service.config.schema import ModelConfig
from service.errors import PlacementMismatch
from service.errors import PluginError
from service.errors import ServiceError
from service.placement import footprint
from service.placement import registry
from service.placement import split_layers
from service.placement import traced
from service.placement.inputs import input_device
from service.placement.inputs import place
from service.placement.plan import device_of
from service.placement.registry import Strategy
from service.placement.tensors import listed
from service.testing import pretended

# accelerators hold; these only keep
STORES = ("cpu", "disk")
ROWS, TOKENS = 2, 6


class NotSimulated(Exception):
    """The simulation cannot say anything about this plan; the text says why."""


def main() -> None:
    """Answer every request on stdin. What strategies print goes to stderr."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same machine everywhere
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """One request's answer: `status` and what belongs to it. Raises nothing."""
    started = time.monotonic()
    kind: str = request["kind"]
    said: dict[str, Any]
    try:
        with pretended.machine(kind):
            said = {"status": "proven", **_run(request)}
    except (PlacementMismatch, PluginError) as error:
        said = {
            "status": "refuted",
            "message": error.message,
            "hint": error.hint,
            "failure_class": error.failure_class,
            "tensors": list(error.tensors),
        }
    except (NotSimulated, pretended.NotAvailable) as reason:
        said = {"status": "not simulated", "message": str(reason)}
    except ServiceError as error:
        said = {"status": "not simulated", "message": error.message}
    except Exception as error:  # a model, or torch's test tools, may raise anything
        said = {"status": "not simulated", "message": _words(error)}
    said["seconds"] = round(time.monotonic() - started, 3)
    translated: dict[str, Any] = json.loads(pretended.shown(json.dumps(said), kind))
    return translated


def _run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Dispatch and run one plan. Raises PlacementMismatch, PluginError, NotSimulated, anything."""
    strategy = _strategy(request["strategy"], request["file"])
    device_map: dict[str, Any] = request["device_map"]
    model = _model(request)
    _tied_together(model, device_map)
    _materialise(model, device_map)
    model = _dispatched(model, device_map)
    _as_mapped(model, device_map)
    ids = torch.zeros((ROWS, TOKENS), dtype=torch.int64)
    with traced.watched(model) as watch:
        try:
            cache = None
            # a prompt, then a token with what the prompt left in the KV cache
            for tokens in (ids, ids[:, :1]):
                inputs = _placed(strategy, model, tokens, request["main_device"])
                said = model(**inputs, past_key_values=cache, use_cache=True)
                cache = getattr(said, "past_key_values", None)
        except ServiceError:
            raise
        except Exception as error:  # whatever the model raises is judged by what it says
            raise _judged(error, watch.failed_in) from error
    reserved: dict[str, str | None] = request["reserved"]
    kv = _kv(cache, reserved)
    for name, device in kv.items():
        planned = reserved[name]
        if planned is not None and device != _pretended(planned):
            raise PlacementMismatch(
                f"the KV cache of {name} is on {device}; the plan reserved it on {planned} (F20)",
                hint="let the plan's module_map say what the device_map of load_kwargs says",
                failure_class="F20",
                tensors=[name],
            )
    return {"operators": watch.operators, "kv": kv}


def _strategy(name: str, file: str | None) -> Strategy:
    """The strategy of the plan, found again. Raises NotSimulated."""
    found = registry.build(files=[Path(file)] if file else [])
    if name not in found.strategies:
        raise NotSimulated(f"strategy {name} was not found again")
    return found.strategies[name]


def _model(request: Mapping[str, Any]) -> Any:
    """The model on meta; bitsandbytes' layers are plain ones here."""
    config = ModelConfig.model_validate(request["config"])
    hf_config = footprint.read_config(config)
    # the fused kernels choose by device and have none for ours; the engine has its own anyway
    hf_config._attn_implementation = "eager"
    # the other ways ask which experts the router chose, or want a real card's number formats
    hf_config._experts_implementation = "batched_mm"
    dtype = getattr(torch, request["dtype"] or "float32")
    return footprint.skeleton(config, hf_config, dtype).eval()


def _tied_together(model: Any, device_map: Mapping[str, Any]) -> None:
    """Raise PlacementMismatch (F8) for a tensor that the map puts on two devices."""
    pairs: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for one, other in pairs.items():
        here, there = device_of(one, device_map), device_of(other, device_map)
        if here != there:
            raise PlacementMismatch(
                f"{one} on {_name(here)} and {other} on {_name(there)} are one tensor (F8)",
                hint="map both to one device",
                failure_class="F8",
                tensors=[one, other],
            )


def _materialise(model: Any, device_map: Mapping[str, Any]) -> None:
    """Tensors without values where the map puts them, tied ones once, as after a load."""
    made: dict[int, torch.nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            device = device_of(f"{prefix}.{key}" if prefix else key, device_map)
            held = _name("cpu" if device in (None, *STORES) else device)
            if key in module._buffers:
                module._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device=held)
                continue
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=held)
                made[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False)
            module._parameters[key] = made[id(tensor)]


def _dispatched(model: Any, device_map: Mapping[str, Any]) -> Any:
    """The model with accelerate's hooks, as `from_pretrained` attaches them."""
    from accelerate import dispatch_model

    if len(set(device_map.values())) == 1:  # it would attach nothing, and it is there already
        return model
    # there is nothing to write to a disk; in RAM the hooks are the same
    kept = {name: "cpu" if device == "disk" else device for name, device in device_map.items()}
    try:
        dispatched = dispatch_model(
            model, device_map=kept, skip_keys=getattr(model, "_skip_keys_device_placement", None)
        )
        split_layers.join(dispatched, kept)  # as `loading.load` does
        return dispatched
    except ValueError as error:  # accelerate's words for a map that does not cover the model
        raise PlacementMismatch(
            f"accelerate refuses the map: {' '.join(str(error).split())[:300]} (F10)",
            failure_class="F10",
        ) from error


def _as_mapped(model: Any, device_map: Mapping[str, Any]) -> None:
    """Raise PlacementMismatch (F17) if accelerate put a parameter elsewhere than the map says."""
    wrong = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        device = device_of(name, device_map)
        if device not in STORES and str(parameter.device) != _pretended(device):
            wrong[name] = parameter.device
    if wrong:
        first = next(iter(wrong))
        raise PlacementMismatch(
            f"{listed(list(wrong))}: the dispatch put it on {wrong[first]}, the map says "
            f"{_name(device_of(first, device_map))} (F17)",
            failure_class="F17",
            tensors=list(wrong),
        )


def _placed(
    strategy: Strategy, model: Any, ids: torch.Tensor, main_device: str | None
) -> dict[str, torch.Tensor]:
    """Inputs where the strategy puts them. Raises PlacementMismatch (F7), PluginError."""
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    try:
        placed = place(strategy.place_inputs, model, given, "place_inputs")
    except PluginError as error:
        if error.__cause__ is not None and _has_no_device(error.__cause__):
            raise NotSimulated(f"place_inputs asks the driver: {error.message}") from None
        raise
    found = placed["input_ids"].device
    expected = torch.device(_pretended(str(input_device(model, main_device))))
    if found != expected:
        raise PlacementMismatch(
            f"place_inputs put input_ids on {found}; inputs belong on {expected} (F7)",
            hint="return service.placement.inputs.to_input_device(model, inputs)",
            failure_class="F7",
            tensors=["input_ids"],
        )
    return placed


def _has_no_device(error: BaseException) -> bool:
    """Whether somebody asked for a real device or a value, which are not here."""
    text = str(error)
    real = ("NVIDIA", "not compiled with CUDA", "not linked with support", "No CUDA GPUs")
    return "fake_tensor" in type(error).__module__ or any(words in text for words in real)


def _judged(error: Exception, where: str | None) -> Exception:
    """A model's error: devices that do not match, or something that cannot be simulated."""
    text = _words(error)
    module = where or "the model"
    if "same device" in text or "different devices" in text:
        return PlacementMismatch(
            f"{module} mixes devices: {text}", failure_class="F17", tensors=[module]
        )
    if isinstance(error, KeyError) and where is None:  # an offload hook looks for its weights
        return PlacementMismatch(
            f"an offload hook does not find {text} (F8)", failure_class="F8", tensors=[str(error)]
        )
    return NotSimulated(f"{module}: {text}")


def _kv(cache: Any, names: Iterable[str]) -> dict[str, str]:
    """Layer -> the device its keys are on; layers without a KV cache are left out."""
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder
    layers = getattr(cache, "layers", None) or []
    found = {}
    for name in names:
        # a layer that is cut open has its KV with its attention: model.layers.3.self_attn
        number = next((int(part) for part in name.split(".") if part.isdigit()), len(layers))
        keys = getattr(layers[number], "keys", None) if number < len(layers) else None
        if isinstance(keys, torch.Tensor):
            found[name] = str(keys.device)
    return found


def _name(device: Any) -> str:
    """A device of a map as text; accelerate writes accelerators as numbers."""
    return f"{pretended.NAME}:{device}" if isinstance(device, int) else str(device)


def _pretended(device: Any) -> str:
    """The name under which torch shows a planned accelerator here."""
    return _name(device if isinstance(device, int) else int(str(device).rpartition(":")[2] or 0))


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    main()
