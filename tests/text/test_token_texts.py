"""What single tokens look like, for byte-level tokenizers and for SentencePiece's."""

import pytest
from tokenizers import Tokenizer
from tokenizers import decoders
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from service.text.token_texts import TokenText
from service.text.token_texts import TokenTexts
from service.text.token_texts import token_texts
from tests.support.tiny import IM_END
from tests.support.tiny import VOCAB
from tests.support.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a word's space is a mark before it, and bytes have tokens of their own."""
    vocab = {"<unk>": 0, "\u2581sea": 1, "sea": 2, "<0xE2>": 3, "<0x41>": 4, "\u2581": 5}
    built = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>")


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (1, TokenText(" sea", b" sea")),
        (2, TokenText("sea", b"sea")),
        (3, TokenText("\\xe2", b"\xe2")),
        (4, TokenText("A", b"A")),
        (5, TokenText(" ", b" ")),
        (0, TokenText("<unk>", b"<unk>", special=True)),
    ],
)
def test_of_sentencepiece(sentencepiece, token, text):
    assert TokenTexts(sentencepiece)[token] == text


def test_of_bytes():
    texts = token_texts(tiny_tokenizer())
    assert texts[97] == TokenText("a", b"a")
    assert texts[32] == TokenText(" ", b" ")
    assert texts[0xC3] == TokenText("\\xc3", b"\xc3")
    assert texts[IM_END] == TokenText("<|im_end|>", b"<|im_end|>", special=True)


def test_the_bytes_of_every_token_of_a_text_are_its_bytes():
    tokenizer = tiny_tokenizer()
    text = "Grüße, 😀 \N{REPLACEMENT CHARACTER}!"
    texts = token_texts(tokenizer)
    assert b"".join(texts[i].bytes for i in tokenizer(text)["input_ids"]) == text.encode()


def test_an_id_that_only_the_model_has_is_empty():
    assert token_texts(tiny_tokenizer())[VOCAB + 5].text == ""


def test_one_tokenizer_has_one_table():
    tokenizer = tiny_tokenizer()
    assert token_texts(tokenizer) is token_texts(tokenizer)
