"""Engines over tiny models, and what transformers itself answers."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers import AutoModelForSeq2SeqLM
from transformers import MambaConfig
from transformers import MixtralConfig
from transformers import OPTConfig
from transformers import PreTrainedModel
from transformers import T5Config

from service.engine.engine import Engine
from service.engine.runner import Runner
from tests.support.tiny import ARCHITECTURES
from tests.support.tiny import IM_END
from tests.support.tiny import IM_START
from tests.support.tiny import MAX_CONTEXT
from tests.support.tiny import VOCAB
from tests.support.tiny import tiny_model

CONTEXT = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": IM_START,
    "eos_token_id": IM_END,
    "pad_token_id": IM_END,
    "tie_word_embeddings": False,
}
# beside those of tests.support.tiny
_OTHERS = {
    "mixtral": MixtralConfig(
        **_COMMON,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=MAX_CONTEXT,
        initializer_range=0.3,
    ),
    "opt": OPTConfig(
        **_COMMON,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_CONTEXT,
        init_std=0.3,
        dropout=0.0,
    ),
}
CARRIED = (*ARCHITECTURES, *_OTHERS)


def model_of(arch: str, *, seed: int = 0) -> PreTrainedModel:
    """A tiny model of one of CARRIED, in float32. Untied, because a tied random model repeats its
    input, whatever its attention does.
    """
    if arch not in _OTHERS:
        return tiny_model(arch, tie=False, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(_OTHERS[arch]), dtype=torch.float32
        ).eval()


def mamba() -> PreTrainedModel:
    config = MambaConfig(**_COMMON, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=IM_END,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_factor=3.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()


def stay(*, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A strategy's place_inputs for a model on the CPU."""
    return dict(inputs)


def generated(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    """What transformers itself says, without the token that ended it. Not while an engine serves
    the model.
    """
    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count
    )
    begun = 1 if model.config.is_encoder_decoder else len(prompt)
    answer: list[int] = output[0, begun:].tolist()
    return answer[:-1] if answer[-1] == IM_END else answer


def engine_over(
    model: PreTrainedModel,
    *,
    max_sequences: int = 3,
    step_tokens: int | None = 16,
    paged: bool = False,
    kv_tokens: int | None = None,
    max_context: int = CONTEXT,
    max_queue: int = 16,
) -> Engine:
    """A started engine; who asks for it closes it."""
    runner = Runner(
        model,
        stay,
        max_context=max_context,
        max_sequences=max_sequences,
        step_tokens=step_tokens,
        paged=paged,
        kv_tokens=kv_tokens,
    )
    engine = Engine(runner, max_queue=max_queue)
    engine.start()
    return engine
