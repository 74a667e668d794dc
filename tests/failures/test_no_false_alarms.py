"""A healthy model gets a valid certificate, whatever its architecture, format and placement; and
an offloaded one answers like the one in RAM.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import MixtralConfig
from transformers import OPTConfig

from service.placement.certificate import certify
from service.placement.checks import CHECKS
from service.placement.loading import Loaded
from service.placement.watch import Watch
from tests.support.placing import IDS
from tests.support.placing import bring_up
from tests.support.placing import logits
from tests.support.placing import offloaded
from tests.support.tiny import ARCHITECTURES
from tests.support.tiny import HEADS
from tests.support.tiny import HIDDEN
from tests.support.tiny import KV_HEADS
from tests.support.tiny import MAX_CONTEXT
from tests.support.tiny import VOCAB
from tests.support.tiny import save_tiny

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "max_position_embeddings": MAX_CONTEXT,
    "pad_token_id": 0,
}
OTHERS = {
    "mixtral": lambda: MixtralConfig(
        **COMMON,
        num_key_value_heads=KV_HEADS,
        intermediate_size=HIDDEN,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=2 * HIDDEN, word_embed_proj_dim=HIDDEN, dropout=0.0),
}
MODELS = [
    *((arch, None) for arch in (*ARCHITECTURES, *OTHERS)),
    ("llama", True),
    ("gpt_neox", True),
    ("gemma2", False),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def saved(folder: Path, arch: str, tie: bool | None, dtype: str) -> Path:
    if arch not in OTHERS:
        return save_tiny(folder, arch, layers=4, tie=tie, dtype=DTYPES[dtype])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[arch](), dtype=DTYPES[dtype])
    model.save_pretrained(folder)
    return folder


def assert_proven(loaded: Loaded) -> None:
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()
    assert [check.name for check in certificate.checks] == [name for name, _ in CHECKS]
    checked = {check.name: check.checked for check in certificate.checks}
    computed = [n for n, _ in loaded.model.named_buffers() if n not in loaded.model.state_dict()]
    assert checked["F3"] == len(computed)
    whole = sum(1 for _ in loaded.model.parameters()) - checked["F13"]
    assert checked["F16"] == whole or "mixtral" in loaded.model.config.model_type
    assert not loaded.notes
    assert_unchanged(loaded)


def assert_unchanged(loaded: Loaded) -> None:
    """The watch finds nothing, however often the model runs."""
    watch = Watch(loaded.model, 30.0)
    for _ in range(3):
        placed = loaded.strategy.place_inputs(loaded.model, {"input_ids": IDS})["input_ids"]
        logits(loaded.model, placed)
        assert watch.look(thorough=True) is None, watch.changes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["cpu", "auto-shard"])
@pytest.mark.parametrize(("arch", "tie"), MODELS)
def test_a_model_in_ram_is_proven(
    tmp_path: Path, arch: str, tie: bool | None, dtype: str, strategy: str
) -> None:
    loaded = bring_up(saved(tmp_path / "model", arch, tie, dtype), strategy)
    assert_proven(loaded)
    assert loaded.placement.dtype == dtype


@pytest.mark.parametrize(
    ("strategy", "quantize"), [("cpu", "nf4"), ("four-bit", "fp4"), ("auto-shard", "int8")]
)
@pytest.mark.parametrize(("arch", "tie"), MODELS)
def test_a_quantised_model_is_proven(
    tmp_path: Path, arch: str, tie: bool | None, strategy: str, quantize: str
) -> None:
    loaded = bring_up(saved(tmp_path / "model", arch, tie, "float32"), strategy, quantize=quantize)
    assert_proven(loaded)
    assert loaded.placement.quantized


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("arch", "tie"), MODELS)
def test_an_offloaded_model_is_proven_and_answers_like_the_one_in_ram(
    tmp_path: Path, arch: str, tie: bool | None, dtype: str, layers: int
) -> None:
    folder = saved(tmp_path / "model", arch, tie, dtype)
    in_ram = AutoModelForCausalLM.from_pretrained(folder)
    loaded = offloaded(folder, layers)
    assert list(loaded.placement.module_map.values()).count("disk") == layers
    assert_proven(loaded)
    assert any(p.is_meta for p in loaded.model.parameters())
    inputs: dict[str, Any] = {"input_ids": IDS}
    placed = loaded.strategy.place_inputs(loaded.model, inputs)["input_ids"]
    torch.testing.assert_close(logits(loaded.model, placed), logits(in_ram), rtol=0, atol=0)
