"""auto-shard over two GPUs: proven, equal to one GPU, whatever the numbering and what is taken.

Every load is a process of its own, so that the numbering of the GPUs can be changed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny import save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
# Llama-3-8B's, with random weights
EIGHT_BILLION = {
    "layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
}
# of bf16: the order of the sums differs between kernels, not between cards
RELATIVE_ERROR = 2e-2
# a lead over the second-best token that rounding cannot close, as a share of the largest logit
CLEAR = 2e-2


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 15 GiB of bf16 weights, made on the first GPU."""
    folder = tmp_path_factory.mktemp("models") / "random-8b"
    with torch.device("cuda:0"):
        save_tiny(folder, "llama", dtype=torch.bfloat16, tie=False, **EIGHT_BILLION)
    torch.cuda.empty_cache()
    return folder


def cards() -> list[str]:
    """The first two GPUs of this process as CUDA_VISIBLE_DEVICES names them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in said.split(",")][:2] if said else ["0", "1"]


def bring_up(
    folder: Path,
    strategy: str,
    logits: Path,
    *,
    visible: list[str] | None = None,
    filled: bool = False,
) -> dict[str, Any]:
    """What `tests.gpu.sharded` says of a process that sees these cards, with the logits."""
    asked = {"folder": str(folder), "strategy": strategy, "logits": str(logits), "filled": filled}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible or cards())}
    command = [sys.executable, "-m", "tests.gpu.sharded", json.dumps(asked)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(visible or cards(), strategy, document)
    assert document["valid"], document["failure"]
    document["logits"] = load_file(logits)["logits"]
    return document


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits equal within bf16, and the same next token wherever one clearly leads."""
    assert found.isfinite().all()
    error = ((found - expected).norm() / expected.norm()).item()
    best = expected.topk(2, dim=-1).values
    clear = best[..., 0] - best[..., 1] > CLEAR * expected.abs().max()
    print(f"relative error {error:.1e}, {int(clear.sum())} of {clear.numel()} tokens clear")
    assert error < RELATIVE_ERROR
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.fixture(scope="module")
def on_one(eight_billion: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Logits of the 8B model on the first GPU alone, [1, tokens, vocabulary]."""
    file = tmp_path_factory.mktemp("one") / "logits.safetensors"
    document = bring_up(eight_billion, "single-gpu", file)
    assert document["devices"] == ["cuda:0"]
    logits: torch.Tensor = document["logits"]
    return logits


def test_eight_billion_parameters_over_two_cards_answer_as_on_one(
    eight_billion: Path, on_one: torch.Tensor, tmp_path: Path
):
    document = bring_up(eight_billion, "auto-shard", tmp_path / "logits")
    assert document["devices"] == ["cuda:0", "cuda:1"]
    weights = document["weights"]
    assert sum(weights.values()) > 14 * GIB
    assert min(weights.values()) > 0.3 * sum(weights.values())
    assert_alike(document["logits"], on_one)


def test_a_card_that_is_half_full_counts_as_taken(
    eight_billion: Path, on_one: torch.Tensor, tmp_path: Path
):
    document = bring_up(eight_billion, "auto-shard", tmp_path / "logits", filled=True)
    assert document["free"][0] <= document["total"][0] - document["filler"]
    for number, free in enumerate(document["free"]):
        assert document["planned"].get(f"cuda:{number}", 0) <= free
    weights = document["weights"]
    assert weights.get("cuda:0", 0) < weights["cuda:1"]
    assert_alike(document["logits"], on_one)


def test_numbering_and_hiding_of_cards_change_nothing_but_the_cards(
    big_llama: Path, tmp_path: Path
):
    first, second = cards()
    both = bring_up(big_llama, "auto-shard", tmp_path / "both", visible=[first, second])
    swapped = bring_up(big_llama, "auto-shard", tmp_path / "swapped", visible=[second, first])
    last = bring_up(big_llama, "auto-shard", tmp_path / "last", visible=[second])
    assert swapped["cards"] == both["cards"][::-1]
    assert last["cards"] == both["cards"][1:]
    assert both["devices"] == swapped["devices"] == ["cuda:0", "cuda:1"]
    assert last["devices"] == ["cuda:0"]
    assert_alike(swapped["logits"], both["logits"])
    assert_alike(last["logits"], both["logits"])
