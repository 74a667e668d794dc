"""What sentence-transformers wrote is read, or refused with the name of the file."""

from pathlib import Path
from typing import Any

import pytest

from service.errors import ModelUnavailable
from service.models import sentence_files
from service.models.sentence_files import SentenceFiles
from tests.support.encoders import write
from tests.support.encoders import write_steps

MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def saved(folder: Path, pooling: Any = MEAN, *more: str) -> Path:
    write_steps(folder, *more)
    write(folder / "1_Pooling" / "config.json", pooling)
    return folder


def test_a_folder_without_them_is_the_mean_scaled_to_length_1(tmp_path: Path):
    assert not sentence_files.is_here(tmp_path)
    assert sentence_files.read(tmp_path) == SentenceFiles("mean", True)


@pytest.mark.parametrize(
    ("said", "pooling"),
    [
        (MEAN, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_max_tokens": True, "word_embedding_dimension": 384}, "max"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_the_pooling_is_what_its_file_says(tmp_path: Path, said: Any, pooling: str):
    assert sentence_files.read(saved(tmp_path, said)).pooling == pooling


@pytest.mark.parametrize("more", [(), ("Normalize",)])
def test_embeddings_are_scaled_only_if_there_is_such_a_step(tmp_path: Path, more: tuple[str, ...]):
    assert sentence_files.read(saved(tmp_path, MEAN, *more)).normalize == bool(more)


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_the_length_and_the_case_of_texts_are_read(tmp_path: Path, name: str):
    write(saved(tmp_path) / name, {"max_seq_length": 256, "do_lower_case": True})
    found = sentence_files.read(tmp_path)
    assert (found.max_tokens, found.lower) == (256, True)


def test_a_length_that_is_null_leaves_the_models_own(tmp_path: Path):
    write(saved(tmp_path) / "sentence_bert_config.json", {"max_seq_length": None})
    assert sentence_files.read(tmp_path).max_tokens is None


def test_a_default_prompt_is_put_before_texts(tmp_path: Path):
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    write(saved(tmp_path) / "config_sentence_transformers.json", prompts)
    assert sentence_files.read(tmp_path).prompt == "query: "


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({**MEAN, "pooling_mode_cls_token": True}, "pooling_mode_mean_tokens and pooling_mode_cls"),
        ({"pooling_mode_weightedmean_tokens": True}, "asks for pooling_mode_weightedmean_tokens"),
        ({"pooling_mode_mean_tokens": False}, "asks for no pooling"),
        ({"pooling_mode": "cls+mean"}, "asks for cls.mean"),
        ([], "holds a list, not a JSON object"),
    ],
)
def test_a_pooling_that_is_not_done_is_refused(tmp_path: Path, said: Any, message: str):
    with pytest.raises(ModelUnavailable, match=f"1_Pooling/config.json: .*{message}"):
        sentence_files.read(saved(tmp_path, said))


def test_another_step_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ModelUnavailable, match=r"modules.json: its steps are .*Dense"):
        sentence_files.read(saved(tmp_path, MEAN, "Dense", "Normalize"))


@pytest.mark.parametrize("steps", [{}, [1], [{"type": "x.Transformer"}], "x"])
def test_steps_that_are_none_are_refused(tmp_path: Path, steps: Any):
    write(tmp_path / "modules.json", steps)
    with pytest.raises(ModelUnavailable, match="is no list of steps"):
        sentence_files.read(tmp_path)


def test_a_model_in_a_folder_of_its_own_is_refused_with_the_way_out(tmp_path: Path):
    kinds = [("Transformer", "0_Transformer"), ("Pooling", "1_Pooling")]
    steps = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds]
    write(tmp_path / "modules.json", steps)
    with pytest.raises(ModelUnavailable, match="the model is in 0_Transformer") as refused:
        sentence_files.read(tmp_path)
    assert "move the files of 0_Transformer up" in (refused.value.hint or "")


def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path):
    kinds = [("Transformer", ""), ("Pooling", "../elsewhere")]
    steps = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds]
    write(tmp_path / "modules.json", steps)
    with pytest.raises(ModelUnavailable, match="outside the folder"):
        sentence_files.read(tmp_path)


def test_a_prompt_whose_tokens_are_left_out_is_refused(tmp_path: Path):
    saved(tmp_path, {**MEAN, "include_prompt": False})
    assert sentence_files.read(tmp_path).prompt == ""
    prompts = {"prompts": {"q": "query: "}, "default_prompt_name": "q"}
    write(tmp_path / "config_sentence_transformers.json", prompts)
    with pytest.raises(ModelUnavailable, match="include_prompt is false"):
        sentence_files.read(tmp_path)


def test_a_default_prompt_that_is_missing_is_refused(tmp_path: Path):
    prompts = {"prompts": {}, "default_prompt_name": "q"}
    write(saved(tmp_path) / "config_sentence_transformers.json", prompts)
    with pytest.raises(ModelUnavailable, match="default_prompt_name is 'q', which prompts lacks"):
        sentence_files.read(tmp_path)
