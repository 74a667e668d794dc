"""Text of a sequence, piece by piece."""

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from service.engine.sequence import Stream
from service.errors import DeadlineExceeded
from service.errors import EngineStopped
from service.text.stream import HELD_TOKENS
from service.text.stream import Detokenizer
from service.text.stream import Piece
from service.text.stream import StopFinder
from service.text.stream import pieces
from tests.support.tiny import IM_END
from tests.support.tiny import IM_START
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IDS = st.lists(st.integers(0, 257), max_size=80)
# Bytes that start, continue and end characters, far more often than chance would mix them.
UTF8_IDS = st.lists(
    st.sampled_from([*"é€😀".encode(), 0xFF, 0xC3, ord("a"), ord(" "), IM_END]), max_size=120
)
TEXT = st.text(alphabet="ab€ ", max_size=30)


def played(ids: list[int], reason: str = "stop") -> Stream:
    stream = Stream(3)
    for token in ids:
        stream.put(token)
    stream.end(reason)  # type: ignore[arg-type]
    return stream


@settings(max_examples=300, deadline=None)
@given(IDS | UTF8_IDS, st.data())
def test_all_pieces_joined_are_what_the_tokenizer_decodes(ids: list[int], data: st.DataObject):
    detokenizer = Detokenizer(TOKENIZER)
    text, at = "", 0
    while at < len(ids):
        step = data.draw(st.integers(1, 5))
        text += detokenizer.feed(ids[at : at + step])
        at += step
    text += detokenizer.flush()
    assert text == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_no_character_is_ever_split(text: str):
    detokenizer = Detokenizer(TOKENIZER)
    seen = [detokenizer.feed([byte]) for byte in text.encode("utf-8", "ignore")]
    seen.append(detokenizer.flush())
    wanted = text.encode("utf-8", "ignore").decode()
    assert "".join(seen) == wanted
    assert all(piece == "" or piece in wanted for piece in seen)
    assert "".join(seen).count("\ufffd") == wanted.count("\ufffd")


def test_an_emoji_appears_with_its_last_byte_and_not_before():
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.feed([byte]) for byte in "😀".encode()] == ["", "", "", "😀"]


def test_bytes_that_will_never_be_a_character_are_not_decoded_again_and_again():
    detokenizer = Detokenizer(TOKENIZER)
    text = "".join(detokenizer.feed([0xFF]) for _ in range(10 * HELD_TOKENS))
    assert len(detokenizer._window) <= 2 * HELD_TOKENS + 8
    assert text + detokenizer.flush() == "\ufffd" * 10 * HELD_TOKENS


def test_a_long_run_of_special_tokens_is_not_kept():
    detokenizer = Detokenizer(TOKENIZER)
    assert "".join(detokenizer.feed([IM_START]) for _ in range(10 * HELD_TOKENS)) == ""
    assert len(detokenizer._window) <= HELD_TOKENS + 1


def test_a_broken_character_at_the_end_is_shown_as_unreadable():
    assert [p.text for p in pieces(TOKENIZER, played(list(b"a\xe2\x82")))] == ["", "a\ufffd"]


def test_a_stop_string_across_tokens_ends_the_answer_and_cancels_the_sequence():
    stream = Stream(1)
    for token in b"one STOP two":
        stream.put(token)
    got = list(pieces(TOKENIZER, stream, ["STOP"]))
    assert got == [Piece("one ", 8, "stop")]
    assert stream.cancelled


def test_tokens_after_the_stop_string_are_not_counted():
    (last,) = pieces(TOKENIZER, played(list(b"abXYZ more")), ["X"])
    assert last == Piece("ab", 3, "stop")


def test_a_stop_string_that_stays_partial_is_shown_at_the_end():
    got = list(pieces(TOKENIZER, played(list(b"one ST"), "length"), ["STOP"]))
    assert [p.text for p in got] == ["one ", "ST"]
    assert got[-1] == Piece("ST", 6, "length")


def test_a_stop_string_that_is_completed_by_the_last_unreadable_byte_is_found():
    got = list(pieces(TOKENIZER, played([*b"ab", 0xE2]), ["b\ufffd"]))
    assert "".join(p.text for p in got) == "a"
    assert got[-1].finish_reason == "stop"


@settings(max_examples=300, deadline=None)
@given(TEXT, st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=4), st.data())
def test_what_a_stop_string_shows_does_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
):
    one_by_one, cut = StopFinder(stops), StopFinder(stops)
    wanted = _shown(one_by_one, list(text))
    parts, at = [], 0
    while at < len(text):
        step = data.draw(st.integers(1, 6))
        parts.append(text[at : at + step])
        at += step
    assert _shown(cut, parts) == wanted
    assert one_by_one.found == cut.found == any(stop in text for stop in stops)
    assert not any(stop in wanted for stop in stops)
    assert text.startswith(wanted)


def _shown(finder: StopFinder, parts: list[str]) -> str:
    text = ""
    for part in parts:
        text += finder.feed(part)
        if finder.found:
            return text
    return text + finder.flush()


def test_an_empty_piece_comes_when_nothing_arrives():
    stream = Stream(1)
    stream.put(ord("a"))
    reading = pieces(TOKENIZER, stream, tick_s=0.0)
    assert [next(reading).text for _ in range(3)] == ["a", "", ""]
    stream.end("stop")
    assert list(reading) == [Piece("", 1, "stop")]


def test_an_error_of_the_sequence_is_raised_after_its_text():
    stream = Stream(1)
    stream.put(ord("a"))
    stream.fail(DeadlineExceeded("too slow"))
    reading = pieces(TOKENIZER, stream)
    assert next(reading).text == "a"
    with pytest.raises(DeadlineExceeded):
        next(reading)


def test_a_sequence_cancelled_by_somebody_else_is_an_error_and_not_an_answer():
    with pytest.raises(EngineStopped):
        list(pieces(TOKENIZER, played([97], "cancelled")))


def test_special_tokens_are_counted_but_not_shown():
    assert list(pieces(TOKENIZER, played([97, IM_START, 98])))[-1].completion_tokens == 3
    assert "".join(p.text for p in pieces(TOKENIZER, played([97, IM_START, 98]))) == "ab"
