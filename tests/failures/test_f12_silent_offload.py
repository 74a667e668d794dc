"""F12: weights that go to RAM or disk although nobody asked for it."""

from pathlib import Path

import pytest

from service.errors import DoesNotFit
from service.errors import PlacementMismatch
from service.placement.certificate import certify
from service.testing.self_test.maps import silently_offloaded
from tests.support.placing import bring_up
from tests.support.placing import judged
from tests.support.placing import offloaded
from tests.support.placing import planned
from tests.support.placing import refusal
from tests.support.placing import squeezed
from tests.support.placing import variant
from tests.support.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "llama", tie=False, layers=4)


def test_plain_a_small_max_memory_sends_the_whole_model_to_disk(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fails when `device_map="auto"` refuses instead of offloading."""
    with caplog.at_level("WARNING", logger="accelerate"):
        model = silently_offloaded(folder)
    assert model.hf_device_map == {"": "disk"}
    assert all(p.is_meta for p in model.parameters())
    said = [r.getMessage() for r in caplog.records if "offloaded" in r.getMessage()]
    assert said == [
        "Some parameters are on the meta device because they were offloaded to the disk."
    ]


def test_ours_refuses_a_model_that_does_not_fit_before_reading_it(folder: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"short \(F20\)") as caught:
        planned(folder, "auto-shard", squeezed(folder))
    assert caught.value.exit_status == 4
    assert "cpu can take" in caught.value.message
    assert caught.value.hint is not None
    assert "moorage plan" in caught.value.hint


def test_ours_refuses_a_silently_offloaded_model_with_share_and_bytes(folder: Path) -> None:
    model = silently_offloaded(folder)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    failed = {c.name: c.error for c in judged(model, folder).checks if c.status == "fail"}
    error = failed["F12"]
    assert isinstance(error, PlacementMismatch)
    assert error.failure_class == "F12"
    assert f"{size:,} bytes (100% of the weights) are offloaded" in error.message
    assert len(error.tensors) == len(list(model.parameters()))
    assert error.hint is not None
    assert "on_no_fit: offload-cpu or offload-disk" in error.hint


def test_ours_refuses_a_device_that_the_plan_does_not_name(folder: Path) -> None:
    """Declared as offloading, but planned for the CPU only."""
    from dataclasses import replace

    def plan(config, hardware):  # type: ignore[no-untyped-def]
        placement = planned(folder)
        return replace(placement, allows=frozenset({"offload"}), module_map={})

    strategy = variant(plan=plan, load=lambda config, placement: silently_offloaded(folder))
    error = refusal(certify(bring_up(folder, strategy)))
    assert error.failure_class == "F12"
    assert "bytes on disk, but the plan uses cpu only (F12)" in error.message


def test_an_offload_that_was_allowed_is_planned_said_and_certified(folder: Path) -> None:
    loaded = offloaded(folder)
    assert loaded.placement.devices == ("cpu", "disk")
    assert "offload" in loaded.placement.allows
    [note] = [n for n in loaded.placement.notes if "rest on disk" in n]
    assert "% of weights" in note
    assert "a token more" in note
    certificate = certify(loaded)
    assert certificate.valid, certificate.failure()
    assert certificate.devices["disk"] == loaded.placement.memory["disk"].weights
