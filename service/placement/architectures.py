"""Which class of transformers loads a model, how long it may get, which path serves it.

All of it follows from config.json.
"""

from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from service.config.schema import ModelConfig
from service.errors import ModelUnavailable

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
        hint="Moorage serves the decoders that AutoModelForCausalLM knows and the encoder-decoders "
        "that AutoModelForSeq2SeqLM knows",
    )


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
