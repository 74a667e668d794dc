"""Failure classes with the libraries as they are installed here: still there, and caught by ours?

`moorage doctor --self-test` runs this in a process of its own, because one reproduction poisons the
process. Tiny random models, a few seconds. Prints one JSON object a line, fields of `Outcome`.
"""

import dataclasses
import gc
import importlib.util
import json
import logging
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers import BitsAndBytesConfig
from transformers import LlamaForCausalLM
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from service.config.schema import ModelConfig
from service.errors import PlacementMismatch
from service.errors import ServiceError
from service.placement import guard
from service.placement import loading
from service.placement import registry
from service.placement.certificate import certify
from service.placement.hardware import Cpu
from service.placement.hardware import Hardware
from service.placement.inputs import to_input_device
from service.placement.plan import Placement
from service.testing.tiny import save_tiny
from service.testing.tiny import tiny_config

IDS = torch.tensor([[7, 1, 250, 33]])
MACHINE = Hardware(Cpu(2**34, 2**33, cores=1, bfloat16=True), disk_free_bytes=2**33)
PARTS = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
# nothing waits this long unless it has failed
PATIENCE_S = 60.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`there`: plain libraries still fail so; `caught`: ours sees it. None: could not be tried."""

    failure_class: str
    what: str
    there: bool | None
    caught: bool | None


def parameter_on_meta(folder: Path) -> tuple[bool, bool]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = model.lm_head
    head.weight = torch.nn.Parameter(torch.empty_like(head.weight, device="meta"))
    return not _raises(lambda: model(IDS)), _judge(model, folder) == "F1"


def buffer_on_meta(folder: Path) -> tuple[bool, bool | None]:
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(tiny_config("llama", tie=False)).eval()
    found = model.load_state_dict(weights, assign=True)
    there = not found.missing_keys and any(b.is_meta for b in model.buffers())
    return there, _judge(model, folder) == "F2" if there else None


def overlapping_loads(folder: Path) -> tuple[bool, bool]:
    """Of two loads in threads the second begins inside the first and ends after it."""
    _overlap(folder)
    there = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.is_meta
    seen = bool(guard.findings())
    loaded = _bring_up(_strategy(), folder)
    tied = loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    return there, tied and certify(loaded).valid and seen == there


def _overlap(folder: Path) -> None:
    inside, both, done = threading.Event(), threading.Barrier(2), threading.Event()
    original = LlamaForCausalLM.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        inside.set()
        both.wait(PATIENCE_S)
        original(self, *args, **kwargs)
        if threading.current_thread().name == "second":
            done.wait(PATIENCE_S)

    def first() -> None:
        AutoModelForCausalLM.from_pretrained(folder)
        done.set()

    def second() -> None:
        inside.wait(PATIENCE_S)
        AutoModelForCausalLM.from_pretrained(folder)

    setattr(LlamaForCausalLM, "__init__", init)  # noqa: B010 - mypy forbids the plain assignment
    try:
        threads = [threading.Thread(target=work, name=work.__name__) for work in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    finally:
        setattr(LlamaForCausalLM, "__init__", original)  # noqa: B010


def inputs_to_model_device(folder: Path) -> tuple[bool, bool]:
    model = _dispatched(folder, **{"model.embed_tokens": "disk"})
    ids = torch.zeros_like(IDS, device=f"{model.device}")  # the thing that nobody should do
    there = _raises(lambda: model.generate(ids, max_new_tokens=1))
    placed = to_input_device(model, {"input_ids": IDS})["input_ids"]
    return there, placed.device.type == "cpu" and not _raises(lambda: model(placed))


def tied_pair_apart(folder: Path) -> tuple[bool, bool | None]:
    model = _dispatched(folder, lm_head="disk")
    there = _raises(lambda: model(IDS))
    places = {**dict.fromkeys(PARTS, "cpu"), "lm_head": "disk"}
    changes = {"module_map": places, "devices": ("cpu", "disk"), "allows": frozenset({"offload"})}
    return there, _judge(model, folder, changes) == "F8" if there else None


def quantised_in_name_only(folder: Path) -> tuple[bool, bool | None]:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["model", "lm_head"]
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}
    )
    none = not any(type(module).__name__ == "Linear4bit" for module in model.modules())
    there = none and getattr(model, "is_loaded_in_4bit", False) is True
    return there, _judge(model, folder, quantize="nf4") == "F13" if there else None


def missing_tensor(folder: Path) -> tuple[bool, bool]:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    there = not _raises(lambda: AutoModelForCausalLM.from_pretrained(folder))
    try:
        _bring_up(_strategy(), folder)
    except ServiceError as error:
        return there, error.failure_class == "F15"
    return there, False


# class, what plain libraries do, whether the model is tied, package it needs, how to find out
REPRODUCTIONS: tuple[tuple[str, str, bool, str | None, Callable[[Path], Any]], ...] = (
    ("F1", "a weight on meta answers without an error", False, None, parameter_on_meta),
    ("F2", "a buffer stays on meta and all keys match", False, None, buffer_on_meta),
    ("F4", "two loads at once break every later one", True, None, overlapping_loads),
    ("F7", "inputs sent to model.device land on meta", False, None, inputs_to_model_device),
    ("F8", "a tied pair on two devices dies when asked", True, None, tied_pair_apart),
    ("F13", "4-bit in name only", False, "bitsandbytes", quantised_in_name_only),
    ("F15", "a missing tensor is random instead", False, None, missing_tensor),
)


def run(folder: Path) -> "list[Outcome]":
    """Every reproduction, each with a model of its own below `folder`. Poisons the process."""
    outcomes = []
    for name, what, tie, package, reproduce in REPRODUCTIONS:
        if package is not None and importlib.util.find_spec(package) is None:
            outcomes.append(Outcome(name, what, None, None))
            continue
        model = save_tiny(folder / name / "model", "llama", tie=tie)
        there, caught = reproduce(model)
        guard.heal()
        gc.collect()
        outcomes.append(Outcome(name, what, there, caught))
    return outcomes


def main() -> None:
    """Print the outcomes, one JSON object a line."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="moorage-self-test-") as folder:
        for outcome in run(Path(folder)):
            sys.stdout.write(json.dumps(dataclasses.asdict(outcome)) + "\n")


# --- facts the reproductions share


def _raises(work: Callable[[], Any]) -> bool:
    try:
        with torch.inference_mode():
            work()
    except (RuntimeError, KeyError, ValueError):  # NotImplementedError is a RuntimeError
        return True
    return False


def _dispatched(folder: Path, **elsewhere: str) -> PreTrainedModel:
    places = {**dict.fromkeys(PARTS, "cpu"), **elsewhere}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=str(folder.parent / "offload")
    )


def _strategy(**hooks: Callable[..., Any]) -> registry.Strategy:
    original = registry.build().select("cpu")
    return dataclasses.replace(original, hooks={**original.hooks, **hooks})


def _bring_up(strategy: registry.Strategy, folder: Path, quantize: Any = "none") -> loading.Loaded:
    config = ModelConfig(
        deployment="self-test",
        model_id="tiny",
        model=str(folder),
        folder=folder,
        offload_folder=folder.parent / "offload",
        strategy="cpu",
        quantize=quantize,
        max_context=64,
        max_sequences=1,
    )
    plan = strategy.plan(config, MACHINE)
    return loading.load(strategy, config, plan, lambda share: None)


def _judge(
    model: PreTrainedModel,
    folder: Path,
    changes: dict[str, Any] | None = None,
    quantize: str = "none",
) -> str | None:
    """The class for which ours refuses a model that somebody else loaded, or None."""

    def plan(config: Any, hardware: Any) -> Placement:
        return dataclasses.replace(_strategy().plan(config, hardware), **(changes or {}))

    strategy = _strategy(load=lambda config, placement: model, plan=plan)
    try:
        failure = certify(_bring_up(strategy, folder, quantize)).failure()
    except PlacementMismatch as error:
        return error.failure_class
    return None if failure is None else failure.failure_class
