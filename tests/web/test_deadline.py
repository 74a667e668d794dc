"""How long a request may take is the server's to say, and less if the client says so."""

import time

import pytest

from tests.web.asking import CHAT
from tests.web.asking import chat_body
from tests.web.asking import error_of


def deadline(client, engine, given: str | None) -> float:
    """Seconds from now to the deadline that the engine was given."""
    headers = {} if given is None else {"X-Request-Timeout-S": given}
    before = time.monotonic()
    response = client.post(CHAT, json=chat_body(), headers=headers)
    assert response.status_code == 200, response.get_data()
    after = time.monotonic()
    found = engine.submissions[-1].deadline
    assert found <= after + 600
    return found - before


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(None, 600), ("5", 5), ("0.25", 0.25), ("600.5", 600), ("999999999", 600)],
)
def test_the_header_shortens_the_servers_own_limit(client, engine, given, seconds):
    assert seconds <= deadline(client, engine, given) < seconds + 60


@pytest.mark.parametrize("given", ["0", "-1", "soon", "1e3", "nan", "inf", "", "1.", "٣"])
def test_anything_else_is_refused_by_name(client, engine, given):
    environ = {"HTTP_X_REQUEST_TIMEOUT_S": given}
    response = client.post(CHAT, json=chat_body(), environ_overrides=environ)
    assert error_of(response, 400)["param"] == "X-Request-Timeout-S"
    assert engine.submissions == []
