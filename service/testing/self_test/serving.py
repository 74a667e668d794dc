"""What goes wrong while a dispatched model is used: F6, F7, F17, F18."""

import threading
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from transformers import PreTrainedModel

from service.engine.runner import Runner
from service.placement.inputs import to_input_device
from service.placement.watch import Watch
from service.testing.overlapping import PATIENCE_S
from service.testing.overlapping import waited
from service.testing.placing import IDS
from service.testing.placing import dispatched
from service.testing.placing import judged
from service.testing.placing import logits
from service.testing.placing import offloaded
from service.testing.self_test.loads import in_a_thread
from service.testing.self_test.outcome import raises
from service.testing.self_test.outcome import refused

ON_DISK = {"model.layers": "disk"}


def interleaved(model: PreTrainedModel, module: str) -> list[Any]:
    """Forwards in two threads: when the first has its weights of `module` in place, it waits until
    the second has run a whole forward. Returns what the first gets: logits or its exception (F6).
    """
    target: Any = model.get_submodule(module)
    compute = target._old_forward
    second_done = threading.Event()
    found: list[Any] = []

    def whole() -> None:
        logits(model)
        second_done.set()

    second = threading.Thread(target=whole)

    def slow(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "first" and not second.ident:
            second.start()
            waited(second_done)
        return compute(*args, **kwargs)

    target._old_forward = slow

    def run() -> None:
        try:
            found.append(logits(model))
        except RuntimeError as error:
            found.append(error)

    first = threading.Thread(target=run, name="first")
    first.start()
    first.join(PATIENCE_S)
    second.join(PATIENCE_S)
    target._old_forward = compute
    return found


# --- the trials


def two_threads(folder: Path) -> tuple[bool, bool]:
    """Ours lets one thread run the model, and refuses every other."""
    [found] = interleaved(dispatched(folder, ON_DISK), "model.layers.1.input_layernorm")
    loaded = offloaded(folder)
    runner = Runner(loaded.model, loaded.strategy.place_inputs, max_context=64)
    runner.open()
    said = in_a_thread(lambda: _words(runner))
    return isinstance(found, RuntimeError), "(F6)" in said


def _words(runner: Runner) -> str:
    try:
        runner.open()
    except Exception as error:  # whatever kind a refusal is of
        return str(error)
    return ""


def inputs_to_model_device(folder: Path) -> tuple[bool, bool]:
    model: Any = dispatched(folder, {"model.embed_tokens": "disk"})
    ids = torch.zeros_like(IDS, device=f"{model.device}")  # the thing that nobody should do
    there = raises(lambda: model.generate(ids, max_new_tokens=1))
    placed = to_input_device(model, {"input_ids": IDS})["input_ids"]
    return there, placed.device.type == "cpu" and not raises(lambda: logits(model, placed))


def hooks_removed(folder: Path) -> tuple[bool, bool]:
    """Found by a certificate, and by the watch of a model that has one."""
    model = dispatched(folder, {"lm_head": "disk"})
    remove_hook_from_submodules(model)
    there = not raises(lambda: logits(model))
    served = offloaded(folder).model
    watch = Watch(served, PATIENCE_S)
    remove_hook_from_submodules(served)
    drift = watch.look(thorough=False)
    noticed = drift is not None and drift.failure_class == "F17"
    return there, noticed and "F1" in refused(lambda: judged(model, folder))


def cast_after_dispatch(folder: Path) -> tuple[bool, bool]:
    model = dispatched(folder, ON_DISK)
    raises(model.half)
    there = {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    served = offloaded(folder).model
    watch = Watch(served, PATIENCE_S)
    for parameter in served.parameters():  # what .half() does, should it be blocked one day
        parameter.data = parameter.data.half()
    drift = watch.look(thorough=False)
    return there, drift is not None and drift.failure_class == "F18"
