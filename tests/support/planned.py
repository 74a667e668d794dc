"""A model's configuration as a strategy gets it, shapes without weights, and small plugin files.

    config = model_config(folder, quantize="nf4")
    write_shape(folder, "llama", hidden_size=8192, ...)    # config.json only
    write_strategy(folder / "mine.py", "raise ValueError()")

Sizes are in bytes.
"""

from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from service.config.origin import Origin
from service.config.schema import ModelConfig
from service.placement import loading
from service.placement import registry
from service.placement.hardware import Hardware
from service.placement.loading import Loaded
from service.placement.registry import Strategy
from service.testing.machines import cards as cards
from service.testing.machines import ram as ram

MIB = 2**20
GIB = 2**30

LLAMA_70B = {
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}

# a strategy with the three required hooks; `load` loads as planned
STRATEGY = '''"""A strategy for tests."""

from service.placement.hookspecs import hookimpl


@hookimpl
def load(config, placement):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(config.folder, **placement.load_kwargs)


@hookimpl
def validate(model, placement):
    from service.placement import checks

    checks.placed_as_planned(model, placement)


@hookimpl
def place_inputs(model, inputs):
    return dict(inputs)
'''


def model_config(folder: Path, **changes: Any) -> ModelConfig:
    """As `service.models.locate` would make it for a model in `folder`."""
    keys: dict[str, Any] = {
        "deployment": "test",
        "model_id": "tiny",
        "model": str(folder),
        "folder": folder,
        "max_context": 64,
        "max_sequences": 2,
        "offload_folder": folder.parent / "offload",
    }
    return ModelConfig(**{**keys, **changes})


def write_shape(folder: Path, arch: str = "llama", **keys: Any) -> Path:
    """Write only a config.json: planning reads no weights. Returns `folder`."""
    CONFIG_MAPPING[arch](**keys).save_pretrained(folder)
    return folder


def write_strategy(path: Path, more: str = "", text: str = STRATEGY) -> Path:
    """Write a strategy file: the working one above and what `more` adds. Returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + more)
    return path.parent


def bring_up(strategy: Strategy, config: ModelConfig, hardware: Hardware) -> Loaded:
    """Settle, plan and load, as a deployment does; every key of `config` is the operator's word."""
    origins = dict.fromkeys(config.model_fields_set, Origin("flag", "--set"))
    settled = registry.settle(config, strategy, origins)
    placement = strategy.plan(settled, hardware)
    return loading.load(strategy, settled, placement, lambda share: None)
