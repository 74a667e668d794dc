"""What single tokens look like: for logprobs, which speak of tokens and not of text."""

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte fallback
WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space


@dataclass(frozen=True)
class TokenText:
    r"""One token by itself.

    text: a token that is only a part of a character is written as its bytes, such as `\xe2\x80`.
    bytes: of UTF-8; None if they cannot be told. special: left out of an answer's text.
    """

    text: str
    bytes: bytes | None
    special: bool = False


class TokenTexts:
    """The tokens of one tokenizer. Any thread."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._known: dict[int, TokenText] = {}  # never more than the vocabulary has

    def __getitem__(self, token: int) -> TokenText:
        """Also of an id without a token, which some models have beyond their tokenizer's."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look(token)
        return found

    def _look(self, token: int) -> TokenText:
        raw = self._tokenizer.convert_ids_to_tokens(token)
        raw = raw if isinstance(raw, str) else ""
        if token in self._special:
            return TokenText(raw, raw.encode(), special=True)
        decoded = self._tokenizer.decode(
            [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text = decoded if isinstance(decoded, str) else "".join(decoded)
        if REPLACEMENT in text and REPLACEMENT not in raw:
            part = _bytes_of(raw)
            if part is None:
                return TokenText(text, None)
            return TokenText("".join(f"\\x{byte:02x}" for byte in part), part)
        if raw.startswith(WORD_START) and not text.startswith(" "):
            text = " " + text  # taken off because nothing stands before it here
        return TokenText(text, text.encode())


# Keeps the last tokenizers alive; a server has one, and two while it changes models.
@functools.lru_cache(maxsize=2)
def token_texts(tokenizer: "PreTrainedTokenizerBase") -> TokenTexts:
    """The same object for the same tokenizer, so that every token is looked at once."""
    return TokenTexts(tokenizer)


def _bytes_of(raw: str) -> bytes | None:
    """Bytes of a token that is no whole text, from how its tokenizer writes it."""
    if found := BYTE_TOKEN.fullmatch(raw):
        return bytes.fromhex(found[1])
    table = _alphabet()
    if raw and all(character in table for character in raw):
        return bytes(table[character] for character in raw)
    return None


@functools.cache
def _alphabet() -> dict[str, int]:
    """GPT-2's way to write bytes: printable ones as they are, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + at): byte for at, byte in enumerate(others)
    }
