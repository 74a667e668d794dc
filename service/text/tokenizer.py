"""The model's tokenizer, and what its files say about ending an answer and sampling."""

from typing import TYPE_CHECKING
from typing import Any

from service.config.schema import ModelConfig
from service.errors import ModelUnavailable
from service.text import templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# sampling settings of a generation_config.json that hold where a request says nothing
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_tokenizer(config: ModelConfig) -> "PreTrainedTokenizerBase":
    """The model's tokenizer. Raises ModelUnavailable."""
    from transformers import AutoTokenizer

    gguf = {} if config.gguf_file is None else {"gguf_file": config.gguf_file}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            config.folder,
            local_files_only=True,
            trust_remote_code=config.trust_remote_code,
            **gguf,
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelUnavailable(
            f"{config.model_id}: its tokenizer cannot be read: "
            f"{' '.join(str(error).split())[:300]}",
            hint="the folder needs tokenizer.json, or the files of a tokenizer transformers knows",
        ) from None
    if tokenizer.chat_template is not None:
        templates.renderer().start()  # by the first conversation it is there
    return tokenizer


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that the model, its generation config or its tokenizer calls the end."""
    ids: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)


def sampling_defaults(model: Any) -> dict[str, float]:
    """What the model's generation_config.json says about sampling; empty if it says nothing.

    `do_sample: false` in the file is temperature 0. A file that is silent leaves OpenAI's defaults.
    """
    said = model.generation_config.to_diff_dict()
    found = {key: said[key] for key in RECOMMENDED if said.get(key) is not None}
    if said.get("do_sample") is False:
        penalty = "repetition_penalty"  # which greedy answers heed as well
        return {"temperature": 0.0} | {key: found[key] for key in found if key == penalty}
    return found
