"""Which class of transformers loads a model, how long it may get, which path serves it.

All of it follows from config.json.
"""

from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from service.config.schema import ModelConfig
from service.errors import ModelUnavailable
from service.models import sentence_files

DECODER = "AutoModelForCausalLM"
ENCODER_DECODER = "AutoModelForSeq2SeqLM"


def auto_class(config: ModelConfig) -> Any:
    """The auto class whose `from_pretrained` loads the configured model.

    Reads config.json. Raises ModelUnavailable.
    """
    return class_of(hf_config(config), config)


def hf_config(config: ModelConfig) -> Any:
    """transformers' configuration of the model. Raises ModelUnavailable."""
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.gguf_file is not None:
        kwargs["gguf_file"] = config.gguf_file
    try:
        return transformers.AutoConfig.from_pretrained(
            config.folder, local_files_only=True, **kwargs
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnavailable(
            f"{config.model_id}: its config.json cannot be read: "
            f"{' '.join(str(error).split())[:300]}",
            hint="the model may need a newer transformers; see moorage doctor",
        ) from None


def class_of(found: Any, config: ModelConfig) -> Any:
    """The auto class for this transformers configuration. Raises ModelUnavailable.

    A BART is known as both kinds: what its config says it is decides.
    """
    if embeds(found, config):
        return _embedding_class(found, config)
    remote = getattr(found, "auto_map", None) or {} if config.trust_remote_code else {}
    if DECODER in remote:
        return transformers.AutoModelForCausalLM
    if ENCODER_DECODER in remote:
        return transformers.AutoModelForSeq2SeqLM
    if found.is_encoder_decoder:
        if type(found) in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            return transformers.AutoModelForSeq2SeqLM
    elif type(found) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING or config.trust_remote_code:
        return transformers.AutoModelForCausalLM
    raise ModelUnavailable(
        f"{config.model_id}: {found.model_type} is not a language model that continues text or "
        "answers it",
        hint="Moorage serves the decoders that AutoModelForCausalLM knows, the encoder-decoders "
        "that AutoModelForSeq2SeqLM knows, and encoders for embeddings",
    )


def embeds(found: Any, config: ModelConfig) -> bool:
    """Whether the configured model gives embeddings, and no text.

    A folder of sentence-transformers does, whatever its model; and so does every encoder.
    """
    if config.gguf_file is None and sentence_files.is_here(config.folder):
        return True
    encoder = type(found) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    both = type(found) in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    causal = getattr(found, "is_decoder", False) or getattr(found, "causal", False)
    return encoder and not both and not causal


def _embedding_class(found: Any, config: ModelConfig) -> Any:
    """The class of the model without a head. Raises ModelUnavailable."""
    known = type(found) in modeling_auto.MODEL_MAPPING or config.trust_remote_code
    if known and not found.is_encoder_decoder:
        return transformers.AutoModel
    raise ModelUnavailable(
        f"{config.model_id}: its {sentence_files.MODULES} says that it gives embeddings, and "
        f"{found.model_type} is not a model of text without a decoder",
        hint="Moorage takes embeddings from encoders and from decoders",
    )


def positions_of(model: Any) -> int | None:
    """Tokens that a table of learned positions has room for; None for a model without one.

    RoBERTa's and its kin's (XLM-R, MPNet) begin counting behind the padding id, so that a table
    of 514 has room for 512.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(module.num_embeddings) - first
    return None


def context_limit(found: Any) -> int | None:
    """Tokens that the model's positions reach; None where nothing says so.

    A T5 has no such number but the length it was trained on, `n_positions`.
    """
    text = found.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def plain_path(found: Any) -> str:
    """Why the engine will certainly run this model one sequence at a time, or ""."""
    if found.is_encoder_decoder:
        return "it is an encoder-decoder"
    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = known.get(type(found), None)
    if kind is not None and (kind._is_stateful or not kind._supports_default_dynamic_cache()):
        return "it has a recurrent state"
    return ""
