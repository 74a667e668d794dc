"""/v1/embeddings over a fake engine: shapes, refusals, limits, waves."""

import base64
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient

from service.config.schema import KeyLimits
from service.deployment.serving import Embeddings
from service.errors import NonFiniteLogits
from service.errors import Overloaded
from service.web.app import create_app
from service.web.embeddings_schema import MAX_INPUTS
from tests.support.fake_deployment import MODEL_ID
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import FakeServing
from tests.support.fake_deployment import fake_config
from tests.support.fake_engine import FakeEngine
from tests.support.tiny import VOCAB
from tests.web.asking import CHAT
from tests.web.asking import COMPLETIONS
from tests.web.asking import body_for
from tests.web.asking import error_of

PATH = "/v1/embeddings"
SIZE = 4
GIVES = Embeddings(dimension=SIZE, at_once=3)
Make = Callable[..., FlaskClient]


def numbers_of(ids: Sequence[int]) -> "np.ndarray[Any, Any]":
    """Of length 1; tells its text by its first token and its length."""
    row = np.array([ids[0], len(ids), 3.0, 4.0], "<f4")
    return (row / np.linalg.norm(row)).astype("<f4")


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(embed=lambda ids: numbers_of(ids).tobytes())


@pytest.fixture
def make(engine: FakeEngine) -> Make:
    """make(gives=..., threads=...): a client of a server whose model gives embeddings."""

    def made(gives: Embeddings | None = GIVES, engine: FakeEngine = engine, **config: Any) -> Any:
        serving = FakeServing(engine=engine, embeddings=gives)
        return create_app(FakeDeployment(fake_config(**config), model=serving)).test_client()

    return made


@pytest.fixture
def client(make: Make) -> FlaskClient:
    return make()


def ask(client: FlaskClient, given: Any, **fields: Any) -> Any:
    return client.post(PATH, json={"model": MODEL_ID, "input": given, **fields})


def rows(response: Any) -> list[Any]:
    assert response.status_code == 200, response.get_data(as_text=True)
    return [item["embedding"] for item in response.get_json()["data"]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("abc", [b"abc"]),
        (["abc"], [b"abc"]),
        (["abc", "d", "ef"], [b"abc", b"d", b"ef"]),
        ([97, 98], [b"ab"]),
        ([[97, 98], [99]], [b"ab", b"c"]),
    ],
)
def test_every_form_of_input_gets_its_rows_in_order(
    client: FlaskClient, given: Any, expected: list[bytes]
):
    response = ask(client, given)
    found = response.get_json()
    assert [item["index"] for item in found["data"]] == list(range(len(expected)))
    assert {item["object"] for item in found["data"]} == {"embedding"}
    assert rows(response) == [numbers_of(ids).tolist() for ids in expected]
    tokens = sum(map(len, expected))
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (found["object"], found["model"]) == ("list", MODEL_ID)


def test_base64_is_little_endian_float32(client: FlaskClient):
    (packed,) = rows(ask(client, "abc", encoding_format="base64"))
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == numbers_of(b"abc").tolist()


def test_the_engine_is_asked_for_embeddings_and_told_who_asks(
    client: FlaskClient, engine: FakeEngine
):
    ask(client, "abc", user="u-1")
    (submission,) = engine.submissions
    assert submission.params.pooled
    assert submission.params.max_tokens == 0
    assert submission.deadline is not None


def test_texts_are_sent_in_steps_of_what_runs_at_once_shortest_first(make: Make):
    class Counting(FakeEngine):
        def submit_all(self, prompts: Any, deadline: Any = None, *, owner: str = "") -> Any:
            sizes.append([len(ids) for ids, _ in prompts])
            return super().submit_all(prompts, deadline, owner=owner)

    sizes: list[list[int]] = []
    client = make(engine=Counting(embed=lambda ids: numbers_of(ids).tobytes()))
    lengths = [5, 1, 4, 2, 8, 7, 3, 6]
    found = rows(ask(client, ["x" * n for n in lengths]))
    assert found == [numbers_of(b"x" * n).tolist() for n in lengths]
    assert sizes == [[1, 2, 3], [4, 5, 6], [7, 8]]


class Filling(FakeEngine):
    """Its queue is full from the second submission on, for a while."""

    refusals = 2

    def submit_all(self, prompts: Any, deadline: Any = None, *, owner: str = "") -> Any:
        if self.submissions and self.refusals:
            self.refusals -= 1
            raise Overloaded("full")
        return super().submit_all(prompts, deadline, owner=owner)


def test_a_queue_that_others_fill_meanwhile_is_waited_for(make: Make):
    client = make(engine=Filling(embed=lambda ids: numbers_of(ids).tobytes()))
    assert len(rows(ask(client, ["a", "b", "c", "d", "e"]))) == 5


def test_a_queue_that_stays_full_ends_with_the_deadline(make: Make):
    engine = Filling(embed=lambda ids: numbers_of(ids).tobytes())
    engine.refusals = 10**9
    client = make(engine=engine)
    response = client.post(
        PATH,
        json={"model": MODEL_ID, "input": ["a", "b", "c", "d"]},
        headers={"X-Request-Timeout-S": "0.5"},
    )
    assert error_of(response, 504)["code"] == "deadline_exceeded"


def test_a_queue_that_is_full_from_the_start_is_a_429(make: Make):
    client = make(engine=FakeEngine(refuse=Overloaded("full", retry_after_s=3)))
    response = ask(client, ["a", "b"])
    assert error_of(response, 429)["code"] == "queue_full"
    assert response.headers["Retry-After"] == "3"


def test_a_text_that_fails_fails_the_request_and_cancels_the_rest(make: Make):
    engine = FakeEngine(fail=NonFiniteLogits("NaN for this input"))
    response = ask(make(engine=engine), ["a", "bb", "ccc", "dddd"])
    assert error_of(response, 500)["code"] == "non_finite_logits"
    assert [sub.stream.cancelled for sub in engine.submissions] == [True] * 4


def test_the_last_of_the_places_is_given_back(make: Make):
    client = make(threads=9)
    for _ in range(3):
        assert ask(client, "abc").status_code == 200
        assert ask(client, "").status_code == 400


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        (None, "input", "input is missing"),
        ("", "input", "input is empty"),
        ([], "input", "input"),
        (["a", ""], "input[1]", "is empty"),
        (7, "input", "input must be a string, an array of strings, or token ids"),
        (["a", 7], "input[1]", "must be"),
        ([[1], "a"], "input[1]", "must be"),
        ([1, "a"], "input[1]", "must be a token id"),
        ([True], "input[0]", "must be"),
        ([[]], "input[0]", "is empty"),
        ([VOCAB], "input", f"ids are 0 to {VOCAB - 1}"),
        ([[1], [-1]], "input[1]", f"ids are 0 to {VOCAB - 1}"),
        (["a"] * (MAX_INPUTS + 1), "input", f"{MAX_INPUTS} are allowed"),
    ],
)
def test_wrong_inputs_are_refused_by_name(
    client: FlaskClient, engine: FakeEngine, given: Any, param: str, message: str
):
    error = error_of(ask(client, given), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert not engine.submissions


@pytest.mark.parametrize(
    ("given", "param"), [("x" * 201, "input"), (["a", "x" * 201], "input[1]"), ([5] * 201, "input")]
)
def test_a_text_beyond_the_context_is_refused_by_its_place(
    client: FlaskClient, engine: FakeEngine, given: Any, param: str
):
    error = error_of(ask(client, given), 400)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 200 tokens" in error["message"]
    assert error["param"] == param
    assert not engine.submissions


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"encoding_format": 1}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 2.0}, "dimensions"),
        ({"dimensions": SIZE + 1}, "dimensions"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"input_type": "query"}, "input_type"),
        ({"add_special_tokens": False}, "add_special_tokens"),
        ({"model": 5}, "model"),
    ],
)
def test_fields_that_are_not_done_are_refused_by_name(
    client: FlaskClient, fields: dict[str, Any], param: str
):
    assert error_of(ask(client, "abc", **fields), 400)["param"] == param


def test_fields_that_nobody_specifies_are_told(client: FlaskClient, make: Make):
    response = ask(client, "abc", wanted="x", user="u", encoding_format=None)
    assert response.status_code == 200
    assert response.headers["x-moorage-ignored"] == "wanted"
    strict = make(unknown_fields="refuse")
    assert "unknown: 'wanted'" in error_of(ask(strict, "abc", wanted="x"), 400)["message"]


# --- shorter embeddings


def test_its_own_dimension_may_be_asked_for(client: FlaskClient):
    assert rows(ask(client, "abc", dimensions=SIZE)) == rows(ask(client, "abc"))


def test_a_shorter_one_is_refused_unless_the_model_was_trained_for_it(
    client: FlaskClient, make: Make
):
    error = error_of(ask(client, "abc", dimensions=2), 400)
    assert (error["param"], error["code"]) == ("dimensions", "unsupported_parameter")
    assert "matryoshka_dimensions" in error["hint"]
    listed = make(replace(GIVES, shorter=(2,)))
    assert error_of(ask(listed, "abc", dimensions=3), 400)["param"] == "dimensions"
    assert len(rows(ask(listed, "abc", dimensions=2))[0]) == 2


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_shorter_one_has_the_length_that_the_model_gives(make: Make, encoding: str, scaled: bool):
    client = make(replace(GIVES, shorter=range(1, SIZE), scaled=scaled))
    (found,) = rows(ask(client, "abc", dimensions=3, encoding_format=encoding))
    row = np.frombuffer(base64.b64decode(found), "<f4") if encoding == "base64" else found
    expected = numbers_of(b"abc")[:3]
    if scaled:
        expected = expected / np.linalg.norm(expected)
    assert np.allclose(row, expected, atol=1e-6)


# --- the model's own ways


def test_a_prompt_and_a_case_that_the_models_files_ask_for_are_given(
    make: Make, engine: FakeEngine
):
    client = make(replace(GIVES, prompt="Query: ", lower=True))
    ask(client, "AbC")
    ask(client, [65, 66])
    assert [bytes(sub.ids) for sub in engine.submissions] == [b"query: abc", b"AB"]


def test_a_model_that_generates_gives_none(make: Make):
    client = make(None)
    error = error_of(ask(client, "abc"), 400)
    assert error["param"] == "model"
    assert "generates text; it gives no embeddings" in error["message"]
    (model,) = client.get("/v1/models").get_json()["data"]
    assert model["capabilities"]["embeddings"] is False
    assert "embedding_dimension" not in model


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [True, False])
def test_a_model_that_gives_embeddings_generates_nothing(
    client: FlaskClient, engine: FakeEngine, path: str, stream: bool
):
    error = error_of(client.post(path, json=body_for(path, stream=stream)), 400)
    assert error["param"] == "model"
    assert "gives embeddings; it generates no text" in error["message"]
    assert "/v1/embeddings" in error["hint"]
    assert not engine.submissions


def test_the_model_says_what_it_can(client: FlaskClient):
    (model,) = client.get("/v1/models").get_json()["data"]
    assert (model["context_length"], model["embedding_dimension"]) == (200, SIZE)
    able = [name for name, can in model["capabilities"].items() if can]
    assert able == ["embeddings"]


def test_another_model_is_not_found(client: FlaskClient):
    response = client.post(PATH, json={"model": "other", "input": "abc"})
    assert error_of(response, 404)["code"] == "model_not_found"


# --- keys


def test_the_tokens_of_a_key_are_counted(make: Make):
    limits = {"a": KeyLimits(concurrent=1, tokens_per_minute=60)}
    client = make(api_keys=["a: secret-of-a"], key_limits=limits)
    key = {"Authorization": "Bearer secret-of-a"}
    body = {"model": MODEL_ID, "input": ["x" * 40, "y" * 40]}
    first = client.post(PATH, json=body, headers=key)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-remaining-tokens"] == "0"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    again = client.post(PATH, json=body, headers=key)
    assert error_of(again, 429)["code"] == "rate_limit_exceeded"
    assert client.post(PATH, json=body).status_code == 401


def test_a_deadline_of_the_request_goes_to_the_engine(client: FlaskClient, engine: FakeEngine):
    before = time.monotonic()
    body = {"model": MODEL_ID, "input": "abc"}
    client.post(PATH, json=body, headers={"X-Request-Timeout-S": "5"})
    (submission,) = engine.submissions
    assert submission.deadline is not None
    assert before + 5 <= submission.deadline <= time.monotonic() + 5
