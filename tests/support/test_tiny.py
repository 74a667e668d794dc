"""The tiny models are what the other tests take them for."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

from tests.support.tiny import ARCHITECTURES
from tests.support.tiny import IM_END
from tests.support.tiny import IM_START
from tests.support.tiny import VOCAB
from tests.support.tiny import save_tiny
from tests.support.tiny import tiny_model
from tests.support.tiny import tiny_tokenizer


def test_a_token_is_a_byte() -> None:
    tokenizer = tiny_tokenizer()
    every = [*range(256), IM_START, IM_END]
    assert len(tokenizer) == VOCAB
    assert (
        tokenizer.decode(tokenizer.encode("é€ \n\x00 x  y<|im_end|>")) == "é€ \n\x00 x  y<|im_end|>"
    )
    assert tokenizer.encode("é<|im_start|>") == [0xC3, 0xA9, IM_START]
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(every)) == every


def test_the_template_is_chatml() -> None:
    text = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone(arch: str) -> None:
    before = torch.get_rng_state()
    one, same, other = tiny_model(arch), tiny_model(arch), tiny_model(arch, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_saved_folder_loads_completely(tmp_path: Path, arch: str, tie: bool) -> None:
    folder = save_tiny(tmp_path / "model", arch, tie=tie, layers=3)
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    assert model.config.num_hidden_layers == 3
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == tie
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == IM_END
    assert tokenizer.chat_template
