"""Web pages: none may use this server unless the configuration names them."""

import pytest

from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment
from tests.support.fake_deployment import fake_config
from tests.web.asking import CHAT
from tests.web.asking import chat_body
from tests.web.asking import error_of

PAGE = "https://app.example"


def preflight(client, origin: str = PAGE, path: str = CHAT, headers: str = "content-type"):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    return client.open(path, method="OPTIONS", headers={"Origin": origin, **asked})


def allowed(response) -> dict[str, str]:
    return {k: v for k, v in response.headers.items() if k.startswith("Access-Control")}


def test_by_default_no_page_may(client):
    error_of(preflight(client), 405)
    assert allowed(preflight(client)) == {}
    response = client.post(CHAT, json=chat_body(), headers={"Origin": PAGE})
    assert allowed(response) == {}
    assert "Vary" not in response.headers


@pytest.mark.parametrize("body", ["text/plain", "application/x-www-form-urlencoded"])
def test_what_a_page_may_send_without_asking_is_refused(client, engine, body):
    response = client.post(CHAT, data=b'{"model": "x"}', headers={"Content-Type": body})
    error_of(response, 415)
    assert engine.submissions == []


def test_a_page_that_is_named_may_ask_and_read(make_client):
    client = make_client(api_keys=["k"], cors_origins=[PAGE])
    asked = preflight(client, headers="authorization, x-stainless-os, x-stainless-<b>, evil")
    assert (asked.status_code, asked.get_data()) == (200, b"")
    found = allowed(asked)
    assert found["Access-Control-Allow-Origin"] == PAGE
    assert "Authorization" in found["Access-Control-Allow-Headers"]
    assert "x-stainless-os" in found["Access-Control-Allow-Headers"]
    assert "<b>" not in found["Access-Control-Allow-Headers"]
    assert "evil" not in found["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Credentials" not in found
    headers = {"Origin": PAGE, "Authorization": "Bearer k"}
    response = client.post(CHAT, json=chat_body(), headers=headers)
    assert response.status_code == 200
    assert allowed(response)["Access-Control-Allow-Origin"] == PAGE
    assert "Origin" in response.headers["Vary"]
    refused = client.post(CHAT, json=chat_body(), headers={"Origin": PAGE})
    error_of(refused, 401)
    assert allowed(refused)["Access-Control-Allow-Origin"] == PAGE, "or the page sees no reason"


@pytest.mark.parametrize("origin", ["https://other.example", "null", PAGE + ".evil", "http" + PAGE])
def test_another_page_may_not(make_client, origin):
    client = make_client(cors_origins=[PAGE])
    error_of(preflight(client, origin), 405)
    assert allowed(client.post(CHAT, json=chat_body(), headers={"Origin": origin})) == {}


def test_a_star_is_every_page(make_client):
    client = make_client(cors_origins=["*"])
    assert allowed(preflight(client, "https://any"))["Access-Control-Allow-Origin"] == "*"


def test_asking_for_what_is_not_there_is_404(make_client):
    error_of(preflight(make_client(cors_origins=[PAGE]), path="/nowhere"), 404)


@pytest.mark.parametrize("path", ["/health/live", "/nowhere", "/metrics", "/v1/models"])
def test_no_answer_can_be_framed_sniffed_or_run(client, path):
    headers = client.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Referrer-Policy"] == "no-referrer"


# --- DNS rebinding


def asking(host: str, **config) -> int:
    client = create_app(FakeDeployment(fake_config(**config))).test_client()
    with client.post(CHAT, json=chat_body(), headers={"Host": host}) as response:
        if response.status_code != 200:
            assert response.get_json()["error"]["code"] in ("forbidden_host", "invalid_api_key")
        return response.status_code


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "app.localhost", "LOCALHOST."],
)
def test_a_server_for_this_machine_answers_to_its_own_names(host):
    assert asking(host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil:1", ":1"],
)
def test_a_server_for_this_machine_without_keys_answers_to_no_other_name(host):
    assert asking(host) == 403


@pytest.mark.parametrize(
    "config",
    [
        {"bind": "0.0.0.0:8000"},
        {"bind": "unix:/run/m.sock"},
        {"cors_origins": ["https://evil.example"]},
    ],
)
def test_where_a_name_proves_nothing_every_name_will_do(config):
    assert asking("evil.example", **config) == 200


def test_with_keys_the_key_decides(make_client):
    assert asking("evil.example", api_keys=["k"]) == 401
