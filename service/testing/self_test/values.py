"""Tensors without their values: F1, F2, F3, F15, F16."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import PreTrainedModel

from service.placement.certificate import certify
from service.testing.placing import bring_up
from service.testing.placing import judged
from service.testing.placing import logits
from service.testing.self_test.outcome import raises
from service.testing.self_test.outcome import refused

# one matrix of the tiny Llama
TENSOR = "model.layers.1.mlp.down_proj.weight"


def stranded(folder: Path, module: str) -> PreTrainedModel:
    """A plainly loaded model one module of which was moved to meta (F1)."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    model.get_submodule(module).to("meta")
    return model


def uncomputed(folder: Path) -> PreTrainedModel:
    """What many loaders do: an empty model, then every tensor of the checkpoint (F2).

    Raises KeyError if keys are reported, which is not what happens.
    """
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with init_empty_weights(include_buffers=True):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(whole.config).eval()
    found = model.load_state_dict(whole.state_dict(), assign=True)
    if str(found) != "<All keys matched successfully>":
        raise KeyError(str(found))
    return model


class Scaled(LlamaForCausalLM):  # type: ignore[misc]
    """What people write: a buffer computed in __init__, and too little to keep in the file (F3)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.arange(1.0, 65.0), persistent=False)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Rewrite the checkpoint in `folder` with its tensors changed; returns `folder`."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    # a model that is loaded keeps the old file open
    save_file(tensors, folder / "new", metadata={"format": "pt"})
    (folder / "new").rename(path)
    return folder


def missing(tensors: dict[str, torch.Tensor]) -> None:
    """For `edit`: a checkpoint without one of its matrices (F15)."""
    del tensors[TENSOR]


def noise(tensor: torch.Tensor) -> None:
    """Write other values into a parameter (F16)."""
    with torch.no_grad():
        tensor.add_(torch.full_like(tensor, 0.01))


# --- the trials


def parameter_on_meta(folder: Path) -> tuple[bool, bool]:
    model = stranded(folder, "lm_head")
    return not raises(lambda: logits(model)), "F1" in refused(lambda: judged(model, folder))


def buffer_on_meta(folder: Path) -> tuple[bool, bool | None]:
    model = uncomputed(folder)
    if not any(buffer.is_meta for buffer in model.buffers()):
        return False, None
    return True, "F2" in refused(lambda: judged(model, folder))


def buffer_of_junk(folder: Path) -> tuple[bool, bool]:
    model = Scaled.from_pretrained(folder)
    there = not torch.equal(model.scale, Scaled(model.config).scale)
    model.scale.fill_(-7)  # memory may by chance hold what the last one left there
    return there, "F3" in refused(lambda: judged(model, folder))


def missing_tensor(folder: Path) -> tuple[bool, bool]:
    edit(folder, missing)
    there = not raises(lambda: AutoModelForCausalLM.from_pretrained(folder))
    return there, "F15" in refused(lambda: bring_up(folder))


def other_values(folder: Path) -> tuple[bool, bool]:
    loaded = bring_up(folder)
    before = logits(loaded.model)
    noise(loaded.model.get_parameter(TENSOR))
    after = logits(loaded.model)
    there = bool(torch.isfinite(after).all()) and not torch.allclose(before, after)
    return there, "F16" in refused(lambda: certify(loaded))
