"""What a model's own files say about ending an answer and sampling."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from service.config.schema import ModelConfig
from service.errors import ModelUnavailable
from service.text.tokenizer import load_tokenizer
from service.text.tokenizer import sampling_defaults
from service.text.tokenizer import stop_ids
from tests.support.tiny import IM_END
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_model


@pytest.mark.parametrize(
    ("settings", "defaults"),
    [
        ({}, {}),
        ({"do_sample": False}, {"temperature": 0.0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {"temperature": 0.6, "top_p": 0.9},
        ),
        ({"do_sample": True, "top_k": 20}, {"top_k": 20}),
        ({"min_p": 0.1, "repetition_penalty": 1.1}, {"min_p": 0.1, "repetition_penalty": 1.1}),
        (
            {"do_sample": False, "repetition_penalty": 1.1},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
    ],
)
def test_defaults_are_what_the_generation_config_says(settings, defaults):
    model = SimpleNamespace(generation_config=GenerationConfig(**settings))
    assert sampling_defaults(model) == defaults


def test_every_id_that_somebody_calls_the_end_ends_an_answer(tmp_path: Path):
    folder = save_tiny(tmp_path / "m")
    config = ModelConfig(deployment="x", model_id="m", folder=folder)
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=[3, 4])
    assert stop_ids(model, load_tokenizer(config)) == {3, 4, IM_END}


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path):
    folder = save_tiny(tmp_path / "m")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelUnavailable, match="m: its tokenizer cannot be read"):
        load_tokenizer(ModelConfig(deployment="x", model_id="m", folder=folder))
