"""Tiny random encoders, and folders of them as sentence-transformers writes them.

    model = tiny_encoder("roberta")
    folder = save_encoder(tmp_path / "m", "bert", pooling="cls", normalize=False)

The tokenizer is that of tests.support.tiny, which begins nothing and ends nothing.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel
from transformers import AutoModelForMaskedLM
from transformers import AutoModelForPreTraining
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.tiny import HEADS
from tests.support.tiny import HIDDEN
from tests.support.tiny import VOCAB
from tests.support.tiny import tiny_tokenizer

POSITIONS = 130
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * HIDDEN,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
    "pad_token_id": 1,
}
OWN: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": HIDDEN, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 2 * HIDDEN},
    "albert": {"embedding_size": 64},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 16},
    "qwen3": {"num_key_value_heads": 2, "head_dim": HIDDEN // HEADS},
}
POOLINGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "last": "pooling_mode_lasttoken",
}


def encoder_config(arch: str = "bert", **changes: Any) -> Any:
    return CONFIG_MAPPING[arch](**{**COMMON, **OWN.get(arch, {}), **changes})


def tiny_encoder(arch: str = "bert", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model without a head, float32 on the CPU, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModel.from_config(encoder_config(arch, **changes), dtype=torch.float32).eval()


def save_encoder(
    folder: Path,
    arch: str = "bert",
    *,
    pooling: str | None = "mean",
    normalize: bool = True,
    length: int | None = None,
    **changes: Any,
) -> Path:
    """A folder to serve. pooling: None leaves the files of sentence-transformers out."""
    tiny_encoder(arch, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if pooling is not None:
        write_steps(folder, *(["Normalize"] if normalize else []))
        write(folder / "1_Pooling" / "config.json", {POOLINGS[pooling]: True})
    if length is not None:
        write(folder / "sentence_bert_config.json", {"max_seq_length": length})
    return folder


def save_headed(folder: Path, arch: str, head: str = "masked", **changes: Any) -> PreTrainedModel:
    """A folder as of bert-base-uncased: an encoder with the head that it was trained with.

    head: "masked" or "pretraining". Returns the model, whose own `base_model` gives the states.
    """
    kinds = {"masked": AutoModelForMaskedLM, "pretraining": AutoModelForPreTraining}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = encoder_config(arch, **changes)
        model: PreTrainedModel = kinds[head].from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def write_steps(folder: Path, *more: str) -> None:
    """modules.json: a transformer, its pooling, and `more`."""
    kinds = ("Transformer", "Pooling", *more)
    paths = ["", *(f"{at}_{kind}" for at, kind in enumerate(kinds) if at)]
    steps = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    write(folder / "modules.json", steps)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
