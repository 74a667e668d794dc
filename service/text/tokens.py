"""Text to token ids and back, with nothing taken away: for /tokenize and /detokenize."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool) -> list[int]:
    """Ids of a text. special: with the tokens that the tokenizer puts around a prompt."""
    encoded = tokenizer(text, add_special_tokens=special, verbose=False)
    return [int(token) for token in encoded["input_ids"]]


def token_strings(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """How the vocabulary writes each token; "" for an id without one."""
    found = tokenizer.convert_ids_to_tokens(list(ids))
    return [token if isinstance(token, str) else "" for token in found]


def id_limit(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The tokenizer's ids are below it."""
    return len(tokenizer)


def text_of(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Text of ids, special tokens included."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text if isinstance(text, str) else "".join(text)
