"""A Llama-shaped random model of 1.2 B parameters, for machines with an NVIDIA GPU."""

from pathlib import Path

import pytest
import torch

from tests.support.tiny import save_tiny

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]

SHAPE = {
    "layers": 24,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="session")
def big_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bf16 weights; hidden 2048, 24 layers, grouped heads."""
    folder = tmp_path_factory.mktemp("models") / "random-llama"
    with torch.device("cuda"):
        save_tiny(folder, "llama", dtype=torch.bfloat16, **SHAPE)
    torch.cuda.empty_cache()
    return folder
