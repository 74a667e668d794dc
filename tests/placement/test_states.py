"""The recurrent states of layers without attention are planned as what a real cache holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import FalconMambaConfig
from transformers import JambaConfig
from transformers import Mamba2Config
from transformers import MambaConfig

from service.errors import ModelUnavailable
from service.placement import footprint
from service.placement import states
from tests.support.planned import model_config

COMMON: dict[str, Any] = {"vocab_size": 258, "hidden_size": 64, "num_hidden_layers": 2}
MODELS = {
    "mamba": lambda: MambaConfig(**COMMON),
    "mamba2": lambda: Mamba2Config(**COMMON, num_heads=8, head_dim=16, n_groups=1),
    "falcon_mamba": lambda: FalconMambaConfig(**COMMON),
    "jamba": lambda: JambaConfig(
        **{**COMMON, "num_hidden_layers": 8},
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_mamba_kernels=False,
    ),
}


def measured(tmp_path: Path, arch: str, dtype: str, **keys: Any) -> footprint.Footprint:
    MODELS[arch]().save_pretrained(tmp_path / arch)
    config = model_config(tmp_path / arch, dtype=dtype, **keys)
    return footprint.measure(config, on_cpu=True, native_bfloat16=True)


def kept(cache: Any) -> int:
    """Bytes of every tensor of a real cache that is not of keys or values."""
    found = (value for layer in cache.layers for value in vars(layer).values())
    tensors = [t for value in found if isinstance(value, dict) for t in value.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", MODELS)
def test_planned_states_are_those_of_a_real_cache(tmp_path: Path, arch: str, dtype: str) -> None:
    found = measured(tmp_path, arch, dtype)
    model = AutoModelForCausalLM.from_config(MODELS[arch](), dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        output = model(torch.ones(1, 7, dtype=torch.int64), use_cache=True)
    cache = getattr(output, "cache_params", None) or output.past_key_values
    assert sum(layer.state for layer in found.layers) == kept(cache) > 0


def test_they_grow_with_the_sequences_and_not_with_the_context(tmp_path: Path) -> None:
    one, two, longer = (
        measured(tmp_path, "mamba", "float32", max_sequences=number, max_context=context)
        for number, context in ((1, 64), (2, 64), (1, 128))
    )
    assert two.kv == 2 * one.kv == 2 * longer.kv
    assert one.kv_of(64, 2) == two.kv
    assert one.kv_bytes_per_token == 0
    assert longer.activations > one.activations


def test_a_hybrid_counts_both(tmp_path: Path) -> None:
    found = measured(tmp_path, "jamba", "float32", max_sequences=3)
    assert [bool(layer.state) for layer in found.layers] == [n != 4 for n in range(8)]
    assert found.kv == found.kv_bytes_per_token * 64 * 3 + 3 * sum(k.state for k in found.layers)


def test_a_model_whose_cache_is_of_another_kind_is_refused_by_name() -> None:
    class Odd:
        def __call__(self, **inputs: Any) -> Any:
            return type("Output", (), {"past_key_values": [1]})

    class Broken:
        def __call__(self, **inputs: Any) -> Any:
            raise RuntimeError("no kernel\nfor that")

    with pytest.raises(ModelUnavailable, match=r"^mine: .* \(its cache is a list\)$"):
        states.bytes_per_sequence(Odd(), 4, "mine")
    with pytest.raises(ModelUnavailable, match=r"\(RuntimeError: no kernel for that\)$"):
        states.bytes_per_sequence(Broken(), 4, "mine")
