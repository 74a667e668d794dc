"""F20: the weights fit and the requests do not: "auto" plans no KV cache."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from service.errors import DoesNotFit
from service.placement.certificate import certify
from service.placement.overhead import CPU_KERNELS
from service.placement.plan import Placement
from service.testing.self_test.maps import BUSY
from service.testing.self_test.maps import weights_without_kv
from tests.support.placing import bring_up
from tests.support.placing import planned
from tests.support.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=4, max_position_embeddings=8192)


def halved(folder: Path, **keys: int) -> dict[str, int]:
    """A `max_memory` with room for the weights and for about half of the KV that `keys` asks."""
    memory = planned(folder, **keys).memory["cpu"]
    return {"cpu": memory.total - memory.kv // 2}


def refused(folder: Path, strategy: str = "cpu", **keys: object) -> DoesNotFit:
    with pytest.raises(DoesNotFit) as caught:
        planned(folder, strategy, **keys)
    return caught.value


def test_plain_transformers_fills_memory_with_weights_and_leaves_no_room(folder: Path) -> None:
    """Fails when `device_map="auto"` leaves room for a KV cache."""
    limit = weights_without_kv(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": limit}, offload_folder=folder.parent / "away"
    )
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size + planned(folder, **BUSY).memory["cpu"].kv > 2 * limit


def test_ours_refuses_it_before_anything_is_read_with_how_much_is_short(folder: Path) -> None:
    limit = weights_without_kv(folder) + CPU_KERNELS
    (folder / "model.safetensors").unlink()
    error = refused(folder, **BUSY, max_memory={"cpu": limit}, dtype="float32")
    assert (error.failure_class, error.exit_status) == ("F20", 4)
    assert re.search(r"needs \S+ MiB of weights and \S+ MiB of KV cache", error.message)
    assert re.search(r"\S+ MiB short \(F20\)", error.message)


@pytest.mark.parametrize("strategy", ["cpu", "auto-shard"])
def test_ours_says_what_would_fit_and_that_does(folder: Path, strategy: str) -> None:
    """Half the KV of 4 x 8192 tokens."""
    asked = {"max_context": 8192, "max_sequences": 4}
    limit = halved(folder, **asked)
    error = refused(folder, strategy, **asked, max_memory=limit)
    found = offers(error)
    assert found, error.hint
    for sequences, context in found:
        smaller = {"max_context": context, "max_sequences": sequences}
        fits = planned(folder, strategy, **smaller, max_memory=limit)
        assert isinstance(fits, Placement)
        assert (fits.context, fits.memory["cpu"].total <= limit["cpu"]) == (context, True)


def offers(error: DoesNotFit) -> list[tuple[int, int]]:
    """Sequences and tokens of each that the error offers."""
    hint = str(error.hint)
    pairs = re.findall(r"(?:max_sequences )?(\d+) x (?:max_context )?([\d,]+)", hint)
    return [(int(sequences), int(context.replace(",", ""))) for sequences, context in pairs]


def test_ours_serves_what_it_offered(folder: Path) -> None:
    asked = {"max_context": 8192, "max_sequences": 4}
    limit = halved(folder, **asked)
    sequences, context = offers(refused(folder, **asked, max_memory=limit))[0]
    loaded = bring_up(folder, max_context=context, max_sequences=sequences, max_memory=limit)
    assert loaded.placement.kv_tokens == context * sequences
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()


def test_ours_says_when_not_even_the_weights_fit(folder: Path) -> None:
    error = refused(folder, **BUSY, max_memory={"cpu": 100_000})
    assert not offers(error)
    assert error.hint is not None
