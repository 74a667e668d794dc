"""Whatever a file, a variable or a flag says: a Config or a ConfigError, nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from service.config import reading
from service.config import variables
from service.config.flags import Flags
from service.config.schema import Config
from service.config.schema import DeploymentConfig
from service.config.schema import ServerConfig
from service.config.text_values import deployment_keys
from service.config.text_values import server_keys
from service.errors import ConfigError

ENV = {"HOME": "/home/someone"}
quick = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)

yaml_like = st.text(st.sampled_from("ab01:-{}[]&*!|>'\"%@`#,?\n \t~<.=é\x00\x85\ud800\U0001f600"))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from(["1GiB", "nf4", "./a", "~", "~x/y", "\0", "a:1", "unix:a", "x" * 300, "4bit"]),
)
keys = st.one_of(
    st.sampled_from([*DeploymentConfig.model_fields, *ServerConfig.model_fields, "cuda", "x"]),
    st.text(max_size=5),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=8,
)
blocks = st.one_of(values, st.dictionaries(keys, values, max_size=4))


def outcome(load: Callable[[], Config]) -> str:
    """ "config" or "error"; anything else that is raised fails the test."""
    try:
        return "config" if load().deployment else "nothing"
    except ConfigError as error:
        return "error" if error.problems and str(error) else "an error without a word"


def read(folder: Path, data: bytes) -> str:
    (folder / "m.yaml").write_bytes(data)
    return outcome(lambda: reading.load(folder / "m.yaml", ENV, Flags()))


@quick
@given(text=st.one_of(yaml_like, st.text()))
@example(text="a: &a [*a]")
@example(text="? ? ? a")
@example(text="- - - -\n  -")
@example(text='"\\UFFFFFFFF"')
@example(text="%TAG ! tag:x,2000:\n---\n!x a")
@example(text="&a a: *a")
@example(text="[" * 3000)
@example(text="{a: " * 3000)
@example(text="- " * 3000)
def test_any_text_as_a_file(folder: Path, text: str) -> None:
    assert read(folder, text.encode("utf-8", "surrogatepass")) == "error"


@quick
@given(data=st.binary())
def test_any_bytes_as_a_file(folder: Path, data: bytes) -> None:
    assert read(folder, data) == "error"


@quick
@given(
    document=st.fixed_dictionaries(
        {"version": st.sampled_from([1, 1, 1, 2, "1", None])},
        optional={
            "deployment": scalars,
            "server": blocks,
            "defaults": blocks,
            "deployments": st.one_of(values, st.fixed_dictionaries({"a": blocks, "b": blocks})),
            "x": values,
        },
    )
)
def test_any_values_as_a_file(folder: Path, document: dict[str, Any]) -> None:
    from ruamel.yaml import YAML

    with (folder / "dumped.yaml").open("w", encoding="utf-8", errors="surrogatepass") as file:
        YAML(typ="safe", pure=True).dump(document, file)
    assert read(folder, (folder / "dumped.yaml").read_bytes()) in ("config", "error")


@quick
@given(
    name=st.sampled_from(
        [*variables.keys_by_name(), *variables.OWN, "DEVICE_MAP", "QUANTIZE", "MOORAGE_X"]
    ),
    text=st.one_of(st.text(), yaml_like),
)
def test_any_value_of_any_variable(folder: Path, name: str, text: str) -> None:
    result = outcome(lambda: reading.load(None, {**ENV, name: text}, Flags()))
    assert result in ("config", "error")


@quick
@given(
    key=st.one_of(st.text(), st.sampled_from([*deployment_keys(), *server_keys(), "options.x"])),
    text=st.one_of(st.text(), yaml_like),
    deployment=st.none() | st.text(),
)
def test_any_flag(folder: Path, key: str, text: str, deployment: str | None) -> None:
    flags = Flags(None, deployment, ((key, text, "--set"),))
    assert outcome(lambda: reading.load(None, ENV, flags)) in ("config", "error")


@pytest.mark.parametrize("text", ["version: 1\ndeployments: {a: }\n"])
def test_a_good_file_is_not_among_the_refused(folder: Path, text: str) -> None:
    assert read(folder, text.encode()) == "config"
