"""Bring a tiny model up as the worker does: select, plan, load, certify; and break it on purpose.

loaded = bring_up(save_tiny(tmp_path / "m"))           # strategy cpu, in RAM
loaded = offloaded(folder, layers=2)                   # two layers on the disk
refusal(judged(broken_model, folder))                  # the certificate's error
"""

import functools
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel

from service.config.schema import ModelConfig
from service.errors import ServiceError
from service.placement import loading
from service.placement import registry
from service.placement.certificate import Certificate
from service.placement.certificate import certify
from service.placement.hardware import Cpu
from service.placement.hardware import Hardware
from service.placement.loading import Loaded
from service.placement.plan import Placement
from service.placement.registry import Strategy
from service.testing.tiny import VOCAB

IDS = torch.tensor([[7, 1, 250, 33, 64]])
ROOMY = Hardware(
    Cpu(2**34, 2**33, cores=2, bfloat16=True),
    disk_free_bytes=2**33,
)


CPU_PARTS = {
    "model.embed_tokens": "cpu",
    "model.layers": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@functools.cache
def built_in() -> registry.Registry:
    return registry.build()


def config_of(folder: Path, strategy: str = "cpu", **keys: Any) -> ModelConfig:
    """The located deployment of a model folder. keys: of the deployment."""
    settings: dict[str, Any] = {"max_context": 64, "max_sequences": 1, **keys}
    return ModelConfig(
        deployment="test",
        model_id="tiny",
        model=str(folder),
        folder=folder,
        offload_folder=folder.parent / f"{folder.name}-offload",
        strategy=strategy,
        **settings,
    )


def squeezed(folder: Path, layers: int = 2, **keys: Any) -> Hardware:
    """A machine without an accelerator that is too small for the whole model: this many of its
    layers must rest on the disk, which is large.
    """
    whole = planned(folder, "cpu", ROOMY, **keys)
    layer = max(unit.weights for unit in whole.units if unit.kv)
    # the largest offloaded layer passes through RAM, so the first one away gains nothing
    free = whole.memory["cpu"].total - (layers - 2) * layer - layer // 2
    return replace(ROOMY, cpu=replace(ROOMY.cpu, free_bytes=free))


def planned(
    folder: Path, strategy: str = "cpu", hardware: Hardware = ROOMY, **keys: Any
) -> Placement:
    """What a built-in strategy plans for the model folder. Raises what the service raises."""
    chosen = built_in().select(strategy)
    return chosen.plan(registry.settle(config_of(folder, strategy, **keys), chosen, {}), hardware)


def offloaded(folder: Path, layers: int = 2, **keys: Any) -> Loaded:
    """The model with its last layers on the disk, by our own strategy."""
    machine = squeezed(folder, layers, **keys)
    return bring_up(folder, "auto-shard", machine, on_no_fit="offload-disk", **keys)


def bring_up(
    folder: Path,
    strategy: str | Strategy = "cpu",
    hardware: Hardware = ROOMY,
    **keys: Any,
) -> Loaded:
    """Plan and load. Raises what the service raises."""
    chosen = built_in().select(strategy) if isinstance(strategy, str) else strategy
    config = registry.settle(config_of(folder, chosen.name, **keys), chosen, {})
    return loading.load(chosen, config, chosen.plan(config, hardware), lambda share: None)


def dispatched(folder: Path, elsewhere: Mapping[str, str]) -> PreTrainedModel:
    """A Llama in RAM but for the parts in `elsewhere`, as plain transformers loads it by a map.

    elsewhere: part of CPU_PARTS -> "disk".
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map={**CPU_PARTS, **elsewhere},
        offload_folder=config_of(folder).offload_folder,
    )
    return model


def variant(strategy: str | Strategy = "cpu", **hooks: Callable[..., Any]) -> Strategy:
    """A strategy some of whose hooks are replaced, as if somebody had written it so."""
    original = built_in().select(strategy) if isinstance(strategy, str) else strategy
    return replace(original, hooks={**original.hooks, **hooks})


def judged(model: PreTrainedModel, folder: Path, strategy: str = "cpu", **keys: Any) -> Certificate:
    """The certificate of a model that somebody else loaded, against the plan of `strategy`."""
    returning = variant(strategy, load=lambda config, placement: model)
    return certify(bring_up(folder, returning, **keys))


def refusal(certificate: Certificate) -> ServiceError:
    """The error of a certificate that must not be valid. Raises AssertionError if it is."""
    failure = certificate.failure()
    if failure is None or certificate.valid:
        raise AssertionError("the certificate is valid")
    return failure


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of one forward, [1, tokens, vocabulary]."""
    with torch.inference_mode():
        values: torch.Tensor = model(ids).logits
    return values


def scribble(model: PreTrainedModel) -> None:
    """Leave other values than a forward of IDS in the memory that a forward allocates and frees."""
    for shift in range(1, 9):
        logits(model, (IDS + 13 * shift) % VOCAB)
