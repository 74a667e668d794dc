"""Token ids as a client of /tokenize and /detokenize sees them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool) -> list[int]:
    """Token ids of text as it stands. special: add the tokens the model's prompts begin with."""
    encoded = tokenizer(text, add_special_tokens=special, verbose=False)
    return [int(token) for token in encoded["input_ids"]]


def token_strings(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Each token as it is in the vocabulary: spaces and bytes may be written in its own way."""
    found = tokenizer.convert_ids_to_tokens(list(ids))
    return ["" if token is None else str(token) for token in found]


def text_of(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of ids, special tokens included. Ids are below `id_limit`."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text if isinstance(text, str) else "".join(text)


def id_limit(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Ids from here on mean nothing to the tokenizer."""
    return len(tokenizer)
