"""What one API key may take, and what its clients are told."""

import pytest

from service.config.schema import KeyLimits
from service.errors import Overloaded
from service.errors import RateLimited
from service.web.admission import Slots
from service.web.limits import Account
from service.web.limits import Accounts
from tests.web.asking import CHAT
from tests.web.asking import chat_body
from tests.web.asking import error_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_has_so_many_requests_open_and_no_more(clock: Clock):
    account = Account(KeyLimits(concurrent=2), clock)
    account.enter()
    account.enter()
    with pytest.raises(RateLimited, match="2 requests open and may have 2") as refused:
        account.enter()
    assert refused.value.retry_after_s == 1
    account.leave()
    account.enter()


def test_tokens_flow_in_evenly_and_say_when_there_is_one_again(clock: Clock):
    account = Account(KeyLimits(tokens_per_minute=60), clock)
    account.enter()
    account.take(80)  # an answer that was longer than what was left
    with pytest.raises(RateLimited) as refused:
        account.enter()
    assert refused.value.retry_after_s == 21
    clock.now = 20.9
    with pytest.raises(RateLimited):
        account.enter()
    clock.now = 21.0
    account.enter()


def test_tokens_do_not_pile_up_beyond_those_of_a_minute(clock: Clock):
    account = Account(KeyLimits(tokens_per_minute=60), clock)
    clock.now = 10_000.0
    account.take(60)
    with pytest.raises(RateLimited):
        account.enter()


def test_a_name_has_its_own_limits_else_those_of_default_and_nobody_has_none(clock: Clock):
    limits = {"default": KeyLimits(concurrent=1), "alice": KeyLimits(concurrent=3)}
    accounts = Accounts(lambda: limits, clock)
    found = {name: accounts.of(name).headers() for name in ("alice", "bob", "")}
    assert found["alice"]["x-ratelimit-limit-requests"] == "3"
    assert found["bob"]["x-ratelimit-limit-requests"] == "1"
    assert found[""] == {}
    assert accounts.of("bob") is accounts.of("bob")
    limits = {"alice": KeyLimits(concurrent=1)}
    assert Accounts(lambda: limits, clock).of("bob").headers() == {}


def test_the_headers_are_those_of_openai(clock: Clock):
    account = Account(KeyLimits(concurrent=4, tokens_per_minute=120), clock)
    account.enter()
    account.take(20)
    assert account.headers() == {
        "x-ratelimit-limit-requests": "4",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-limit-tokens": "120",
        "x-ratelimit-remaining-tokens": "100",
        "x-ratelimit-reset-tokens": "10.000s",
    }


def test_a_key_at_its_limit_gets_429_and_others_go_on(make_client, engine):
    engine.hang = True
    client = make_client(api_keys=["alice: a", "bob: b"], key_limits={"default": {"concurrent": 1}})
    stream = client.post(CHAT, json=chat_body(stream=True), headers=bearer("a"))
    refused = client.post(CHAT, json=chat_body(), headers=bearer("a"))
    error = error_of(refused, 429)
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert refused.headers["Retry-After"] == "1"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert client.get("/v1/models", headers=bearer("a")).status_code == 200
    engine.hang = False
    assert client.post(CHAT, json=chat_body(), headers=bearer("b")).status_code == 200
    stream.close()
    assert client.post(CHAT, json=chat_body(), headers=bearer("a")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_and_answers_are_taken_off_the_tokens_of_the_minute(make_client, engine, stream):
    client = make_client(api_keys=["alice: a"], key_limits={"alice": {"tokens_per_minute": 1}})
    with client.post(CHAT, json=chat_body(stream=stream), headers=bearer("a")) as response:
        assert response.status_code == 200
        assert response.get_data()
    used = len(engine.submissions[0].ids) + len(engine.answer)
    refused = client.post(CHAT, json=chat_body(), headers=bearer("a"))
    assert "1 tokens per minute" in error_of(refused, 429)["message"]
    # one token a minute: so many minutes until there is one again
    assert (used - 1) * 60 < int(refused.headers["Retry-After"]) <= used * 60
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


def test_a_request_that_is_refused_costs_nothing(make_client, engine):
    client = make_client(api_keys=["alice: a"], key_limits={"alice": {"concurrent": 1}})
    for _ in range(3):
        error_of(client.post(CHAT, json=chat_body(temperature=9), headers=bearer("a")), 400)
    assert client.post(CHAT, json=chat_body(), headers=bearer("a")).status_code == 200


def test_without_keys_there_are_no_limits_and_no_headers(make_client):
    client = make_client(key_limits={"default": {"concurrent": 1, "tokens_per_minute": 1}})
    for _ in range(3):
        response = client.post(CHAT, json=chat_body())
        assert response.status_code == 200
        assert not [name for name in response.headers.keys() if "ratelimit" in name]  # noqa: SIM118


def test_full_places_say_when_one_is_free_by_how_long_they_were_held():
    slots = Slots(threads=10)
    assert slots._retry_after_s() == 1
    for _ in range(100):
        slots._held(7.0)
    held = [slots.take(), slots.take()]
    with pytest.raises(Overloaded) as refused:
        slots.take()
    assert refused.value.retry_after_s == 4
    for slot in held:
        slot.release()
    assert slots._held_s < 7.0
