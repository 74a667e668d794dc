"""Tiny random models of real architectures, and a byte-level tokenizer for them.

    model = tiny_model("llama")                       # float32, CPU, eval mode
    folder = save_tiny(tmp_path / "m", "llama")      # a folder for `from_pretrained`

Token ids 0..255 are bytes, 256 is <|im_start|> and 257 is <|im_end|>, which ends a turn.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM
from transformers import GenerationConfig
from transformers import PreTrainedConfig
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IM_START = 256
IM_END = 257
VOCAB = 258
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = HIDDEN // HEADS
SLIDING_WINDOW = 8
MAX_CONTEXT = 512

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What differs from architecture to architecture. Windows are short, so that tests reach beyond
# them.
_GROUPED = {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_SIZE}
_GEMMA = {
    **_GROUPED,
    "query_pre_attn_scalar": HEAD_SIZE,
    "sliding_window": SLIDING_WINDOW,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": {"num_key_value_heads": KV_HEADS},
    "qwen3": _GROUPED,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "mistral": {**_GROUPED, "sliding_window": SLIDING_WINDOW},
    "phi": {"num_key_value_heads": KV_HEADS, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
}
ARCHITECTURES = tuple(_SPECIAL)
# of four experts, two for each token
_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": HIDDEN,
    },
}
MIXTURES = tuple(_EXPERTS)


def tiny_config(
    arch: str = "llama", *, layers: int = 2, tie: bool | None = None, **changes: Any
) -> PreTrainedConfig:
    """Configuration of a tiny model: hidden size 64, 4 heads, 258 tokens, context 512.

    arch: one of ARCHITECTURES or MIXTURES (transformers' `model_type`). tie: whether lm_head shares
    the embedding; None leaves it to the architecture. changes: further keys of the configuration.
    """
    keys: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MAX_CONTEXT,
        # Larger than usual: with the ordinary 0.02 a random model says one token for ever.
        "initializer_range": 0.3,
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "pad_token_id": IM_END,
    }
    if arch != "gpt2":  # derives it
        keys["intermediate_size"] = 2 * HIDDEN
    if tie is not None:
        keys["tie_word_embeddings"] = tie
    special = {**_SPECIAL, **_EXPERTS}[arch]
    return CONFIG_MAPPING[arch](**{**keys, **special, **changes})


def tiny_model(
    arch: str = "llama",
    *,
    seed: int = 0,
    layers: int = 2,
    tie: bool | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """A random model on the CPU, in eval mode. The same arguments give the same weights."""
    config = tiny_config(arch, layers=layers, tie=tie, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, two special tokens, a ChatML template."""
    # Byte-level BPE writes each byte as a printable character; without merges every byte stays a
    # token. GPT-2's alphabet: printable bytes stand for themselves, the others follow from U+0100
    # in order.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {
        chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken("<|im_start|>", special=True, normalized=False),
            AddedToken("<|im_end|>", special=True, normalized=False),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        model_max_length=MAX_CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tiny(
    folder: Path,
    arch: str = "llama",
    *,
    seed: int = 0,
    layers: int = 2,
    tie: bool | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Write a model folder: config, safetensors weights, tokenizer. Returns `folder`."""
    model = tiny_model(arch, seed=seed, layers=layers, tie=tie, dtype=dtype, **changes)
    model.generation_config = GenerationConfig(
        bos_token_id=IM_START, eos_token_id=IM_END, pad_token_id=IM_END
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
