"""MOORAGE_* and --set: every key, as text."""

from pathlib import Path

import pytest

from service.config import variables
from service.config.schema import DeploymentConfig
from service.config.schema import FallbackStep
from service.config.schema import KeyLimits
from service.config.schema import ServerConfig
from tests.config.conftest import Load
from tests.config.conftest import Refusal

VALUES = {
    "MOORAGE_BIND": ("localhost:1", "localhost:1"),
    "MOORAGE_THREADS": ("32", 32),
    "MOORAGE_MAX_QUEUE": ("0", 0),
    "MOORAGE_API_KEYS_FILE": ("/k", Path("/k")),
    "MOORAGE_MAX_BODY": ("1MiB", 2**20),
    "MOORAGE_REQUEST_TIMEOUT_S": ("5", 5.0),
    "MOORAGE_GRACE_S": ("7.5", 7.5),
    "MOORAGE_UNKNOWN_FIELDS": ("refuse", "refuse"),
    "MOORAGE_KEY_LIMITS": ("{key-1: {concurrent: 2}}", {"key-1": KeyLimits(concurrent=2)}),
    "MOORAGE_CORS_ORIGINS": ("['https://a.example']", ("https://a.example",)),
    "MOORAGE_CONTROL_SOCKET": ("/run/m/s", Path("/run/m/s")),
    "MOORAGE_LOG_FORMAT": ("json", "json"),
    "MOORAGE_METRICS_PREFIX": ("vllm", "vllm"),
    "MOORAGE_TRACING": ("on", "on"),
    "MOORAGE_MODEL": ("123", "123"),
    "MOORAGE_STRATEGY": ("'my own'", "my own"),
    "MOORAGE_STRATEGY_DIRS": ("[/a, /b]", (Path("/a"), Path("/b"))),
    "MOORAGE_OPTIONS": ("{a: [1, x], b: yes}", {"a": [1, "x"], "b": "yes"}),
    "MOORAGE_FALLBACK": ("[cpu]", (FallbackStep(strategy="cpu"),)),
    "MOORAGE_QUANTIZE": ("int8", "int8"),
    "MOORAGE_DTYPE": ("float32", "float32"),
    "MOORAGE_COMPILE": ("true", True),
    "MOORAGE_MAX_CONTEXT": (" 2048 ", 2048),
    "MOORAGE_MAX_SEQUENCES": ("1", 1),
    "MOORAGE_KV_TOKENS": ("8192", 8192),
    "MOORAGE_ON_NO_FIT": ("offload-cpu", "offload-cpu"),
    "MOORAGE_OFFLOAD_FOLDER": ("/o", Path("/o")),
    "MOORAGE_KEEP_FREE": ("cuda: 1KiB", {"cuda": 1024}),
    "MOORAGE_MAX_MEMORY": ("{cuda:0: 1KiB, cpu: 5}", {"cuda:0": 1024, "cpu": 5}),
    "MOORAGE_LOAD_TIMEOUT_S": ("10", 10.0),
    "MOORAGE_WATCH_INTERVAL_S": ("0", 0.0),
    "MOORAGE_IDLE_UNLOAD_S": ("60", 60.0),
    "MOORAGE_ON_DRIFT": ("reload", "reload"),
    "MOORAGE_TRUST_REMOTE_CODE": ("true", True),
    "MOORAGE_ALLOW_PICKLE": ("True", True),
}


def test_every_key_has_a_variable_of_its_own() -> None:
    assert set(VALUES) == set(variables.keys_by_name())
    assert len(VALUES) == len(ServerConfig.model_fields) + len(DeploymentConfig.model_fields)
    assert not set(VALUES) & set(variables.OWN)


@pytest.mark.parametrize("name", VALUES)
def test_a_variable_sets_its_key(load: Load, name: str) -> None:
    text, value = VALUES[name]
    key = variables.keys_by_name()[name]
    config = load(None, {name: text, "MOORAGE_API_KEYS": "k"})
    block = config.server if key.startswith("server.") else config.deployment
    assert getattr(block, key.removeprefix("server.")) == value
    assert str(config.origins[key]) == f"env {name}"


@pytest.mark.parametrize("name", VALUES)
def test_set_sets_the_same_key(load: Load, name: str) -> None:
    text, value = VALUES[name]
    key = variables.keys_by_name()[name]
    config = load(None, {"MOORAGE_API_KEYS": "k"}, None, f"{key}={text.strip()}")
    block = config.server if key.startswith("server.") else config.deployment
    assert getattr(block, key.removeprefix("server.")) == value
    assert str(config.origins[key]) == "flag --set"


@pytest.mark.parametrize("name", [*VALUES, *variables.OWN])
def test_an_empty_variable_is_not_set(load: Load, name: str) -> None:
    assert load(None, {name: " "}) == load(None)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"MOORAGE_STRATEGEY": "x"},
            "env MOORAGE_STRATEGEY: unknown variable; did you mean MOORAGE_STRATEGY?",
        ),
        ({"MOORAGE_PORT": "80"}, "env MOORAGE_PORT: unknown variable; the address is MOORAGE_BIND"),
        ({"MOORAGE_ZZZZZZ": "x"}, "env MOORAGE_ZZZZZZ: unknown variable"),
        (
            {"MOORAGE_MAX_CONTEXT": "8k"},
            "env MOORAGE_MAX_CONTEXT: max_context is '8k'; give a whole number, 1 or more",
        ),
        (
            {"MOORAGE_MAX_SEQUENCES": "0"},
            "env MOORAGE_MAX_SEQUENCES: max_sequences is 0; give 1 or more",
        ),
        ({"MOORAGE_THREADS": "1"}, "env MOORAGE_THREADS: server.threads is 1; give 9 or more"),
        (
            {"MOORAGE_ALLOW_PICKLE": "1"},
            "env MOORAGE_ALLOW_PICKLE: allow_pickle is 1; give true or false",
        ),
        ({"MOORAGE_OPTIONS": "{a"}, "env MOORAGE_OPTIONS: options: not valid YAML"),
        ({"MOORAGE_OPTIONS": "{a: 1, a: 2}"}, "env MOORAGE_OPTIONS: options: duplicate key"),
        ({"MOORAGE_FALLBACK": "cpu"}, "env MOORAGE_FALLBACK: fallback is 'cpu'; give a list"),
        ({"MOORAGE_OPTIONS": "{a: !!b c}"}, "env MOORAGE_OPTIONS: options: tags are not supported"),
        (
            {"MOORAGE_MODEL": "a\udcff"},
            "env MOORAGE_MODEL: model: contains a zero byte or is not UTF-8",
        ),
    ],
)
def test_a_wrong_variable_is_named(refusal: Refusal, env: dict[str, str], message: str) -> None:
    assert str(refusal(None, env)).startswith(message)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("strategey=x", "flag --set: strategey: unknown key; did you mean 'strategy'?"),
        ("bind=x:1", "flag --set: bind: unknown key; did you mean 'server.bind'?"),
        ("server.bnd=x:1", "flag --set: server.bnd: unknown key; did you mean 'server.bind'?"),
        ("deployment=x", "flag --set: deployment: unknown key; choose with --deployment"),
        ("defaults.dtype=auto", "flag --set: defaults.dtype: unknown key; write 'dtype'"),
        ("dtype.x=auto", "flag --set: dtype is one value, no mapping; set dtype itself"),
        ("options.=1", "flag --set: options has an empty entry"),
        ("keep_free.cdua=1", "flag --set: keep_free.cdua is no device"),
        ("keep_free.cuda=lots", "flag --set: keep_free.cuda is 'lots'; give a size"),
        ("model=", "flag --set: model is empty; give text"),
        ("max_context=", "flag --set: max_context is empty; give a whole number"),
    ],
)
def test_a_wrong_flag_is_named(refusal: Refusal, setting: str, message: str) -> None:
    assert str(refusal(None, None, None, setting)).startswith(message)


def test_an_optional_path_can_be_unset(load: Load) -> None:
    text = "version: 1\ndeployments: {a: {offload_folder: /o}}\n"
    assert load(text, None, None, "offload_folder=null").deployment.offload_folder is None


def test_variables_that_kubernetes_makes_for_a_service_are_ignored_with_a_notice(
    load: Load,
) -> None:
    env = {
        "MOORAGE_PORT": "tcp://10.0.0.1:80",
        "MOORAGE_PORT_80_TCP": "tcp://10.0.0.1:80",
        "MOORAGE_PORT_80_TCP_ADDR": "10.0.0.1",
        "MOORAGE_SERVICE_HOST": "10.0.0.1",
        "MOORAGE_SERVICE_PORT_HTTP": "80",
        "MOORAGE_MODEL_SERVICE_HOST": "10.0.0.2",
    }
    config = load(None, env)
    assert config.server == ServerConfig()
    (notice,) = config.notices
    assert all(name in notice for name in env)


def test_the_cache_is_the_variable_s_then_xdg_s_then_below_home(load: Load) -> None:
    xdg = {"XDG_CACHE_HOME": "/x"}
    assert load(None, {**xdg, "MOORAGE_CACHE": "/c"}).cache == Path("/c")
    assert load(None, xdg).cache == Path("/x/moorage")
    assert load(None, {"XDG_CACHE_HOME": "relative"}).cache == Path("/home/someone/.cache/moorage")
    assert str(load(None, {"MOORAGE_CACHE": "/c"}).origins["cache"]) == "env MOORAGE_CACHE"


@pytest.mark.parametrize(
    "name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
)
def test_a_collector_in_the_environment_turns_tracing_on_unless_something_says_off(
    load: Load, name: str
):
    there, plain = {name: "http://collector:4318"}, "version: 1\ndeployments: {a: {}}\n"
    config = load(plain, there)
    assert config.server.tracing == "on"
    assert str(config.origins["server.tracing"]) == f"env {name}"
    assert load(plain, {name: " "}).server.tracing == "off"
    assert load(plain, {**there, "MOORAGE_TRACING": "off"}).server.tracing == "off"
    assert load(f'{plain}server: {{tracing: "off"}}\n', there).server.tracing == "off"
