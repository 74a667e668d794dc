"""Requests that are wrong: refused with the reason, before anything is computed for them."""

import json

import pytest

from tests.faults.control import BROKEN_TEXT
from tests.faults.control import FAULTY_TEXT
from tests.faults.control import FAULTY_TOKEN
from tests.faults.control import REFUSED_TEXT
from tests.faults.serving import BODY_BYTES
from tests.faults.serving import CHAT
from tests.faults.serving import COMPLETIONS
from tests.faults.serving import Faulty
from tests.faults.serving import chat
from tests.faults.serving import completion
from tests.faults.serving import head
from tests.faults.serving import raw
from tests.faults.serving import refused
from tests.faults.serving import tells_nothing

INVALID = "invalid_value"
TOO_LARGE = "request_too_large"


def test_invalid_utf_8_is_400(server: Faulty) -> None:
    body = b'{"model": "tiny", "prompt": "\xff\xfe"}'
    refused(server.ask(COMPLETIONS, body), 400, INVALID, "the body is not UTF-8")


def test_half_a_surrogate_pair_is_400(server: Faulty) -> None:
    body = b'{"model": "tiny", "prompt": "\\ud800"}'
    refused(server.ask(COMPLETIONS, body), 400, INVALID, "half a surrogate pair")


def test_duplicate_keys_are_400(server: Faulty) -> None:
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 1, "max_tokens": 400}'
    refused(server.ask(COMPLETIONS, body), 400, INVALID, "'max_tokens' occurs twice")


@pytest.mark.parametrize("deep", [b"[", b'{"a":'], ids=["lists", "objects"])
def test_deep_json_is_400(server: Faulty, deep: bytes) -> None:
    body = b'{"model": "tiny", "prompt": ' + deep * 30_000
    answer = server.ask(COMPLETIONS, body)
    refused(answer, 400, INVALID, "nested deeper than 64 levels")


@pytest.mark.parametrize("body", [b"", b"[]", b'"text"', b"{", b'{"a": NaN}', b"1" * 5000])
def test_what_is_no_json_object_is_400(server: Faulty, body: bytes) -> None:
    refused(server.ask(COMPLETIONS, body), 400, INVALID)


def test_a_huge_body_with_a_length_is_413_and_is_not_read(server: Faulty) -> None:
    length = f"Content-Length: {10**12}"
    refused(raw(server, head(COMPLETIONS, length)), 413, TOO_LARGE, str(BODY_BYTES))


def test_a_huge_body_without_a_length_is_413_at_the_limit(server: Faulty) -> None:
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    chunks = chunk * (BODY_BYTES // 4096 + 2)
    answer = raw(server, head(COMPLETIONS, "Transfer-Encoding: chunked"), chunks)
    refused(answer, 413, TOO_LARGE, str(BODY_BYTES))


def test_a_bad_chunk_is_400(server: Faulty) -> None:
    answer = raw(server, head(COMPLETIONS, "Transfer-Encoding: chunked"), b"zz\r\n{}\r\n0\r\n\r\n")
    refused(answer, 400, INVALID, "could not be read to its end")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_400_before_the_first_event(
    server: Faulty, stream: bool
) -> None:
    answer = server.ask(COMPLETIONS, completion("a" * 600, 1, stream=stream))
    refused(answer, 400, "context_length_exceeded", "maximum context length is 512 tokens")


@pytest.mark.parametrize("stream", [False, True])
def test_more_tokens_than_the_context_has_are_400_before_the_first_event(
    server: Faulty, stream: bool
) -> None:
    answer = server.ask(CHAT, chat("a", max_tokens=513, stream=stream))
    refused(answer, 400, "context_length_exceeded", "512 tokens", "you asked for 513 more")


def test_messages_that_the_template_refuses_are_400_with_its_words(server: Faulty) -> None:
    answer = server.ask(CHAT, chat(REFUSED_TEXT))
    refused(answer, 400, INVALID, "refuses the messages: no such conversation")


def test_a_template_that_breaks_is_400_and_its_line_is_in_the_log(server: Faulty) -> None:
    answer = server.ask(CHAT, chat(BROKEN_TEXT), X_Request_Id="broken-template")
    refused(answer, 400, INVALID, "fails on the messages: ZeroDivisionError")
    found = [line for line in server.lines() if "chat template raised" in line["message"]]
    assert "ZeroDivisionError (line 1)" in found[-1]["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize"])
def test_a_tokenizer_that_raises_is_500_with_an_id_to_find_it_by(server: Faulty, path: str) -> None:
    body = {"prompt": FAULTY_TEXT}
    if path != "/tokenize":
        body = chat(FAULTY_TEXT) if path == CHAT else completion(FAULTY_TEXT, 1)
    request_id = f"tokenizer{path.replace('/', '.')}"
    answer = server.ask(path, body, X_Request_Id=request_id)
    refused(answer, 500, "internal_error", f"request id {request_id}")
    assert [x for x in server.lines() if request_id in x["message"] and "traceback" in x]


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_cannot_be_decoded_ends_its_answer_and_its_sequence(
    server: Faulty, stream: bool
) -> None:
    body = completion("a", 400, stream=stream, logit_bias={str(FAULTY_TOKEN): 100})
    with server.control.during(decode="raise"):
        answer = server.ask(COMPLETIONS, body)
        server.wait_most(1)
    text = answer.body.decode()
    tells_nothing(text)
    assert "[DONE]" not in text
    # a slow server may have said ": waiting" before
    [told] = [
        line.removeprefix("data: ")
        for line in text.splitlines()
        if line.startswith(("data: ", "{"))
    ]
    assert json.loads(told)["error"]["code"] == "internal_error"
    assert answer.status == (200 if stream else 500)
