"""Weights that are quantised in name only, or cannot be computed with: F13, F14.

bitsandbytes is optional: nothing here imports it before it is asked for.
"""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers import BitsAndBytesConfig
from transformers import PreTrainedModel

from service.placement.certificate import certify
from service.testing.placing import bring_up
from service.testing.placing import judged
from service.testing.placing import logits
from service.testing.self_test.outcome import NotTried
from service.testing.self_test.outcome import need
from service.testing.self_test.outcome import raises
from service.testing.self_test.outcome import refused
from service.testing.tiny import save_tiny

# of a tiny Llama: an input size that is less than a block
NARROW: dict[str, Any] = {"hidden_size": 32, "head_dim": 8}
PACKING = "bitsandbytes packs 4-bit layers in blocks only where the CPU has AVX512-BF16"


def four_bit(folder: Path, *skipped: str) -> PreTrainedModel:
    """The model loaded in nf4 by plain transformers, but for the modules in `skipped`."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=list(skipped) or None,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}
    )
    return model


def four_bit_layers(model: PreTrainedModel) -> int:
    """How many layers are in 4 bits."""
    return sum(type(module).__name__ == "Linear4bit" for module in model.modules())


def packs() -> bool:
    """Whether bitsandbytes packs 4-bit layers on this CPU, which is what F14 needs."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


# --- the trials


def in_name_only(folder: Path) -> tuple[bool, bool | None]:
    need("bitsandbytes")
    model = four_bit(folder, "model", "lm_head")
    if four_bit_layers(model) or getattr(model, "is_loaded_in_4bit", False) is not True:
        return False, None
    return True, "F13" in refused(lambda: judged(model, folder, quantize="nf4"))


def cannot_run(folder: Path) -> tuple[bool, bool | None]:
    need("bitsandbytes")
    if not packs():
        raise NotTried(PACKING)
    narrow = save_tiny(folder.parent / "narrow", "llama", tie=False, **NARROW)
    model = four_bit(narrow)
    if not raises(lambda: logits(model)):
        return False, None
    return True, "F14" in refused(lambda: certify(bring_up(narrow, quantize="nf4")))
