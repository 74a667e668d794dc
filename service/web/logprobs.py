"""Logprobs as the two endpoints write them. A model's own infinities never come here."""

import codecs
from collections.abc import Iterable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from service.text.token_texts import TokenTexts

if TYPE_CHECKING:
    from service.engine.choosing import Chosen


def of_chat(texts: TokenTexts, tokens: Iterable["Chosen"]) -> dict[str, Any]:
    """The `logprobs` object of a chat's choice."""
    content = []
    for chosen in tokens:
        top = [_entry(texts, token, value) for token, value in chosen.top]
        content.append({**_entry(texts, chosen.token, chosen.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(texts: TokenTexts, token: int, logprob: float | None) -> dict[str, Any]:
    known = texts[token]
    return {
        "token": known.text,
        "logprob": logprob,
        "bytes": None if known.bytes is None else list(known.bytes),
    }


class CompletionLogprobs:
    """The `logprobs` objects of one choice of a completion, one after the other."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._offset = 0  # characters of the choice's text before the next token
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def of_prompt(
        self, text: str, ids: Sequence[int], scored: Sequence["Chosen"]
    ) -> dict[str, Any]:
        """Of an echoed prompt: its first token has no logprob. text: as it is echoed."""
        found = _empty()
        for at, token in enumerate(ids):
            known = self._texts[token]
            self._add(found, token, scored[at - 1] if at else None)
            if not known.special:
                self._advance(token)
            elif text.startswith(known.text, self._offset):  # else the tokenizer added it
                self._offset += len(known.text)
        self._offset = len(text)  # some tokenizers do not give back every space
        self._characters.reset()
        return found

    def of(self, tokens: Iterable["Chosen"]) -> dict[str, Any]:
        """Of the next tokens of the answer."""
        found = _empty()
        for chosen in tokens:
            self._add(found, chosen.token, chosen)
            if not self._texts[chosen.token].special:
                self._advance(chosen.token)
        return found

    def _add(self, found: dict[str, Any], token: int, chosen: "Chosen | None") -> None:
        text = self._texts[token].text
        found["tokens"].append(text)
        found["token_logprobs"].append(None if chosen is None else chosen.logprob)
        found["text_offset"].append(self._offset)
        if chosen is None:
            found["top_logprobs"].append(None)
            return
        top: dict[str, float | None] = {}
        for other, value in chosen.top:  # the likelier first, should two look alike
            top.setdefault(self._texts[other].text, value)
        top.setdefault(text, chosen.logprob)  # always told, as OpenAI specifies
        found["top_logprobs"].append(top)

    def _advance(self, token: int) -> None:
        known = self._texts[token]
        if known.bytes is None:
            self._offset += len(known.text)
        else:
            self._offset += len(self._characters.decode(known.bytes))


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two `logprobs` objects of a completion as one."""
    return {key: first[key] + second[key] for key in first}


def _empty() -> dict[str, Any]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
