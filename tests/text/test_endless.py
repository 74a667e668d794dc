"""Text that cannot fit costs nothing: it is refused by its length."""

import pytest

from service.errors import ContextTooLong
from service.text.chat import encode
from service.text.chat import encode_text
from service.text.chat import vocabulary
from tests.support.tiny import tiny_tokenizer

CONTEXT = 100


def test_endless_text_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny_tokenizer()
    text = "x" * (vocabulary(tokenizer).longest * (CONTEXT + 1))
    assert encode_text(tokenizer, "x", CONTEXT)

    def tokenise(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was tokenised")

    monkeypatch.setattr(type(tokenizer), "__call__", tokenise)
    monkeypatch.setattr(tokenizer, "apply_chat_template", tokenise)
    with pytest.raises(ContextTooLong, match=f"maximum context length is {CONTEXT} tokens"):
        encode_text(tokenizer, text, CONTEXT)
    with pytest.raises(ContextTooLong, match="Send less text"):
        encode(tokenizer, [{"role": "user", "content": text}], CONTEXT)
