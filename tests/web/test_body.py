"""Bodies that are not one plain JSON object of allowed size: the right 4xx, in JSON, never 500."""

import io
import json

import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.errors import TooLarge
from service.web.body import parse
from service.web.body import read_json
from tests.support.fake_deployment import MODEL_ID
from tests.web.asking import CHAT
from tests.web.asking import COMPLETIONS
from tests.web.asking import chat_body
from tests.web.asking import error_of

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def post(client, data: bytes, content_type: str = "application/json"):
    return client.post(CHAT, data=data, content_type=content_type)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no body"),
        (b"{", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b'"text"', "must be a JSON object, not a string"),
        (b"[1]", "not an array"),
        (b"5", "not an integer"),
        (b"null", "not null"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 characters"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "deeper than 64"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeper than 64"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "deeper than 64"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": "\xff"}', "byte 7"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    ],
)
def test_what_is_not_plain_json_is_400(client, data, words):
    assert words in error_of(post(client, data), 400)["message"]


def test_a_key_that_occurs_twice_is_named(client):
    error = error_of(post(client, b'{"model": "a", "x": {"seed": 1, "seed": 2}}'), 400)
    assert error["param"] == "seed"
    assert "'seed' occurs twice" in error["message"]


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b'{"messages": [{"content": "a\\ud800"}]}', "messages[0].content"),
        (b'{"stop": ["a", "\\udc00b"]}', "stop[1]"),
        (b'{"\\ud800": 1}', None),
    ],
)
def test_half_a_surrogate_pair_is_refused_where_it_stands(client, data, param):
    error = error_of(post(client, data), 400)
    assert error["param"] == param
    assert "surrogate" in error["message"]


def test_strings_at_the_deepest_allowed_level_pass():
    depth = 63
    assert parse(b'{"a": ' + b"[" * depth + b'"x"' + b"]" * depth + b"}")


def test_a_clients_own_name_comes_back_short(client):
    key = b'"' + b"k" * 100_000 + b'": 1'
    response = post(client, b"{" + key + b", " + key + b"}")
    error_of(response, 400)
    assert len(response.data) < 1000


def test_a_whole_surrogate_pair_is_a_character():
    assert parse(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"]
)
def test_another_content_type_is_415(client, content_type):
    data = json.dumps(chat_body()).encode()
    error = error_of(post(client, data, content_type), 415)
    assert error["code"] == "unsupported_media_type"


def test_a_compressed_body_is_415(client):
    headers = {"Content-Encoding": "gzip"}
    error_of(client.post(CHAT, json=chat_body(), headers=headers), 415)


def test_a_body_over_the_limit_is_413_before_it_is_read(make_client):
    client = make_client(max_body=100)
    error = error_of(post(client, b" " * 101), 413)
    assert "100 bytes" in error["message"]
    assert error_of(post(client, b" " * 100), 400)


class Chunks(io.RawIOBase):
    """Input that a server ends itself, as with a chunked body; counts what was taken."""

    def __init__(self, size: int, error: Exception | None = None) -> None:
        self.left, self.taken, self.error = size, 0, error

    def read(self, size: int = -1) -> bytes:
        if self.error is not None and self.left == 0:
            raise self.error
        given = self.left if size < 0 else min(size, self.left)
        self.left -= given
        self.taken += given
        return b" " * given


def chunked(source: Chunks) -> dict:
    return {
        "CONTENT_TYPE": "application/json",
        "wsgi.input": source,
        "wsgi.input_terminated": True,
    }


def test_a_chunked_body_over_the_limit_is_refused_one_byte_beyond_it():
    source = Chunks(10**9)
    with pytest.raises(TooLarge):
        read_json(chunked(source), 100_000)
    assert source.taken == 100_001


def test_a_bad_chunk_is_the_clients_error():
    class InvalidChunkSize(Exception):
        """As gunicorn's, derived from Exception alone."""

    with pytest.raises(InvalidRequest, match="could not be read"):
        read_json(chunked(Chunks(10, InvalidChunkSize("zz"))), 1000)


def test_a_body_that_ends_early_is_the_clients_error():
    environ = {
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": "50",
        "wsgi.input": io.BytesIO(b"{}"),
    }
    with pytest.raises(InvalidRequest, match="ended after 2 of 50 bytes"):
        read_json(environ, 1000)


@pytest.mark.parametrize("length", ["-1", "x", "1" * 30, "\u0661"])
def test_a_content_length_that_is_no_number_is_the_clients_error(length):
    environ = {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": length}
    with pytest.raises(InvalidRequest, match="content length"):
        read_json(environ, 1000)


def test_without_length_or_chunks_nothing_is_read():
    environ = {"CONTENT_TYPE": "application/json", "wsgi.input": Chunks(5)}
    with pytest.raises(InvalidRequest, match="no body"):
        read_json(environ, 1000)


# --- never 500, never HTML, whatever comes


@FUZZ
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_400(client, data):
    error_of(post(client, data), 400)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "stop",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "seed",
        "temperature",
        "top_p",
        "top_k",
        "tools",
        "logprobs",
        "response_format",
        "stop_token_ids",
    ]
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "system", "tool"]) | JSON,
            "content": st.text() | JSON,
            "name": JSON,
        },
    ),
    max_size=3,
)


@FUZZ
@given(st.dictionaries(NAMES | st.text(max_size=5), JSON, max_size=5))
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_arbitrary_json_is_answered_or_refused_in_json(client, path, body):
    check(client.post(path, data=json.dumps(body), content_type="application/json"))


@FUZZ
@given(MESSAGES, st.dictionaries(NAMES, JSON, max_size=1))
def test_arbitrary_messages_are_answered_or_refused_in_json(client, messages, more):
    body = {"model": MODEL_ID, "messages": messages, **more}
    check(client.post(CHAT, data=json.dumps(body), content_type="application/json"))


def check(response) -> None:
    assert response.status_code in (200, 400, 404), response.get_data(as_text=True)
    if response.status_code == 200:
        assert response.mimetype in ("application/json", "text/event-stream")
        assert "internal error" not in response.get_data(as_text=True)
    else:
        error_of(response, response.status_code)
