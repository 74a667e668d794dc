"""docs/config.md and the JSON schema are made from the models, and agree with what is read."""

import re
from pathlib import Path
from typing import Any

from service.config import reference
from service.config import variables
from service.config.schema import DeploymentConfig
from service.config.schema import FallbackStep
from service.config.schema import ServerConfig
from service.config.starter import STARTER
from tests.config.conftest import Load

DOCS = Path(__file__).parents[2] / "docs" / "config.md"


def test_docs_config_md_is_up_to_date() -> None:
    said = "run: python -m service.config.reference > docs/config.md"
    assert DOCS.read_text(encoding="utf-8") == reference.markdown(), said


def test_every_key_and_variable_is_documented() -> None:
    text = reference.markdown()
    for key in (*DeploymentConfig.model_fields, *ServerConfig.model_fields):
        assert f"| `{key}` |" in text
    for name in (*variables.keys_by_name(), *variables.OWN, "DEVICE_MAP", "QUANTIZE"):
        assert f"`{name}`" in text


def test_documented_sizes_are_the_real_defaults(load: Load) -> None:
    (size,) = re.findall(r"`max_body` \| size \| `(\w+)`", reference.markdown())
    assert load(None, None, None, f"server.max_body={size}").server == ServerConfig()


def definition(name: str) -> dict[str, Any]:
    properties: dict[str, Any] = reference.json_schema()["$defs"][name]["properties"]
    return properties


def test_the_schema_knows_every_key_and_no_other() -> None:
    schema = reference.json_schema()
    assert set(definition("DeploymentConfig")) == set(DeploymentConfig.model_fields)
    assert set(definition("ServerConfig")) == set(ServerConfig.model_fields)
    assert set(definition("FallbackStep")) == set(FallbackStep.model_fields)
    for node in (schema, *schema["$defs"].values()):
        assert node["additionalProperties"] is False
    assert schema["required"] == ["version", "deployments"]


def test_the_schema_accepts_sizes_as_text_and_refuses_unknown_devices() -> None:
    keep_free = definition("DeploymentConfig")["keep_free"]
    ((pattern, size),) = keep_free["patternProperties"].items()
    assert re.search(pattern, "cuda")
    assert not re.search(pattern, "cdua")
    assert keep_free["additionalProperties"] is False
    text = next(choice["pattern"] for choice in size["anyOf"] if choice["type"] == "string")
    assert re.search(text, "1.5GiB")
    assert not re.search(text, "lots")


def test_a_step_of_fallback_is_a_name_or_a_mapping_without_nulls() -> None:
    choices = definition("DeploymentConfig")["fallback"]["items"]["anyOf"]
    assert choices == [{"type": "string"}, {"$ref": "#/$defs/FallbackStep"}]
    assert definition("FallbackStep")["quantize"] == {
        "description": "Weight format of this attempt.",
        "enum": ["none", "nf4", "fp4", "int8", "int4"],
        "type": "string",
    }


def test_every_size_the_schema_accepts_is_read(load: Load) -> None:
    for text, value in [("5B", 5), ("1KiB", 1024), ("1.5 MiB", 3 * 2**19), ("2GB", 2 * 10**9)]:
        assert load(None, None, None, f"server.max_body={text}").server.max_body == value


def test_an_editor_finds_the_schema_from_the_starter() -> None:
    assert STARTER.startswith("# yaml-language-server: $schema=./moorage.schema.json\n")
