"""The config's reference, made from the models: docs/config.md and the JSON schema for editors.

`python -m service.config.reference` prints docs/config.md.
"""

import sys
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from service.config import old_names
from service.config import variables
from service.config.schema import SIZE_SCHEMA
from service.config.schema import UNITS
from service.config.schema import DeploymentConfig
from service.config.schema import FallbackStep
from service.config.schema import FileConfig
from service.config.schema import KeyLimits
from service.config.schema import ServerConfig

INTRODUCTION = """\
# Configuration

<!-- Made by `python -m service.config.reference > docs/config.md`; a test compares. -->

Moorage reads one YAML file: the one named by `--config`, else by `MOORAGE_CONFIG`, else
`./moorage.yaml`. Without a file it serves SmolLM2-135M on the CPU. `moorage config init` writes a
starter, `moorage config show --origin` prints every value and where it came from.

The file is YAML 1.2 (`yes` and `on` are text). Unknown and duplicate keys, tags and merge keys
(`<<`) are refused; every mistake of every deployment is reported at once, with its line and column.
A block left empty is an empty block. Keys and tokens do not belong into the file.

## Layers

Later wins, value by value: built-in, the strategy's own defaults, `defaults`,
`deployments.<name>`, `DEVICE_MAP` and `QUANTIZE`, `MOORAGE_*`, flags (`--set key=value`, `--model`,
`--strategy`, `--quantize`, `--bind`).

- A mapping or a list is replaced as a whole, except by a dotted key:
  `--set options.first_layers_on_cpu=4` and `--set keep_free.cuda=1GiB` set one entry.
- Keys of the server block are written with their block: `--set server.threads=32`.
- Text, names and paths after `=` or in a variable are taken as they stand; everything else is read
  as YAML: `MOORAGE_FALLBACK='[auto-shard, cpu]'`. An empty variable is not set. An unknown
  `MOORAGE_*` variable is an error.
- Options belong to a strategy. A layer that chooses another strategy drops the options written for
  the old one, with a notice.
- Relative paths in the file (`api_keys_file`, `strategy_dirs`, `offload_folder`, a `unix:` socket,
  a model that begins with `./` or `../` or is a folder beside the file) are meant from the file's
  folder; in variables and flags from the working directory. `~` is your home.
"""


COLUMNS = ("Key", "Value", "Default", "Variable", "Meaning")


def json_schema() -> dict[str, Any]:
    """The JSON schema of moorage.yaml, as the YAML language server reads it."""
    schema = _without_titles(FileConfig.model_json_schema())
    for name in ("server", "defaults"):  # a block whose lines are all comments is null
        block = schema["properties"][name]
        schema["properties"][name] = {
            "anyOf": [{"$ref": block["$ref"]}, {"type": "null"}],
            "description": block["description"],
        }
    blocks = schema["properties"]["deployments"]
    for pattern, block in blocks["patternProperties"].items():
        blocks["patternProperties"][pattern] = {"anyOf": [block, {"type": "null"}]}
    steps = schema["$defs"]["FallbackStep"]["properties"]
    for key, node in steps.items():  # a key may be left out, but not be null
        steps[key] = {"description": node["description"], **node.get("anyOf", [node])[0]}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "moorage.yaml", **schema}


def markdown() -> str:
    """docs/config.md."""
    return "\n".join(
        [
            INTRODUCTION,
            "## Top level\n",
            *_rows(("Key", "Value", "Meaning"), _top_level()),
            "\n## server\n",
            *_rows(COLUMNS, _keys(ServerConfig)),
            "\n## An entry of server.key_limits\n",
            "The key is the name of an API key, or `default` for keys without an entry. What is "
            "left out is not limited.\n",
            *_rows(("Key", "Value", "Meaning"), _parts(KeyLimits)),
            "\n## defaults and deployments.NAME\n",
            *_rows(COLUMNS, _keys(DeploymentConfig)),
            "\n## A step of fallback\n",
            "The name of a strategy, or a mapping with these keys. What it says wins over the "
            "deployment and its\nvariables and flags, for this attempt only; what it leaves out is "
            "as in the deployment.\n",
            *_rows(("Key", "Value", "Meaning"), _parts(FallbackStep)),
            f"\nA size is a whole number of bytes, or a number with one of {', '.join(UNITS)}.\n",
            "## Other variables\n",
            *_rows(("Variable", "Meaning"), [(f"`{k}`", v) for k, v in variables.OWN.items()]),
            "\n## Old names\n",
            "Still read, each with a notice. Upper and lower case are the same.\n",
            *_rows(("Variable", "Value", "Means"), _old_rows()),
            "",
        ]
    )


def _top_level() -> list[tuple[str, ...]]:
    properties = FileConfig.model_json_schema()["properties"]
    return [(f"`{key}`", _value(node), node["description"]) for key, node in properties.items()]


def _parts(model: type[BaseModel]) -> list[tuple[str, ...]]:
    """The keys of a mapping inside a block, which have no variables."""
    properties = model.model_json_schema()["properties"]
    return [(f"`{key}`", _value(node), node["description"]) for key, node in properties.items()]


def _keys(model: type[BaseModel]) -> list[tuple[str, ...]]:
    properties = model.model_json_schema()["properties"]
    return [
        (
            f"`{key}`",
            _value(node),
            _default(node, model.model_fields[key].get_default(call_default_factory=True)),
            f"`{variables.name_of(key)}`",
            node["description"],
        )
        for key, node in properties.items()
    ]


def _value(node: Mapping[str, Any]) -> str:
    """What a value may be, from its JSON schema."""
    if node.get("anyOf") == SIZE_SCHEMA["anyOf"]:
        return "size"
    if "anyOf" in node:
        return " or ".join(_value(part) for part in node["anyOf"] if part.get("type") != "null")
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{choice}`" for choice in node["enum"])
    if "$ref" in node:
        return "block"
    kind: str = node["type"]
    if kind == "array":
        return f"list of {_value(node['items'])}s"
    if kind == "object":
        parts = list(node.get("patternProperties", {}).values())
        return f"mapping to {_value(parts[0])}s" if parts else "mapping"
    if kind in ("integer", "number"):
        return ("whole number" if kind == "integer" else "number") + _limits(node)
    return "`true`, `false`" if kind == "boolean" else str(node.get("format", "text"))


def _limits(node: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in node:
        high = f", at most {node['maximum']:,}" if "maximum" in node else ""
        return f", more than {node['exclusiveMinimum']:g}{high}"
    if "minimum" not in node:
        return ""
    high = f" to {node['maximum']:,}" if "maximum" in node else " or more"
    return f", {node['minimum']:,}{high}"


def _default(node: Mapping[str, Any], value: Any) -> str:
    if value is None or value == () or value == {}:
        return "none"
    if node.get("anyOf") == SIZE_SCHEMA["anyOf"]:
        return f"`{value // UNITS['MiB']}MiB`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _old_rows() -> list[tuple[str, str, str]]:
    strategies = [
        (value, f"`strategy: {name}`") for value, name in old_names.STRATEGY_NAMES.items()
    ]
    strategies += [
        ("cuda:N", "`strategy: single-gpu`, `options: {device: N}`"),
        (" or ".join(old_names.NO_MAP), "`single-gpu` if there is a GPU, else `cpu`"),
    ]
    formats = [(value, f"`quantize: {name}`") for value, name in old_names.QUANTIZE_NAMES.items()]
    return [
        *(("`DEVICE_MAP`", value, means) for value, means in strategies),
        *(("`QUANTIZE`", value, means) for value, means in formats),
    ]


def _rows(headers: tuple[str, ...], rows: list[Any]) -> list[str]:
    lines = [headers, tuple("---" for _ in headers), *rows]
    return [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines
    ]


def _without_titles(node: Any) -> Any:
    """pydantic's titles repeat the names; a mapping with patterns has no other keys."""
    if isinstance(node, list):
        return [_without_titles(part) for part in node]
    if not isinstance(node, dict):
        return node
    clean = {
        key: _without_titles(part)
        for key, part in node.items()
        if key != "title" or not isinstance(part, str)
    }
    if "patternProperties" in clean:
        clean["additionalProperties"] = False
    return clean


if __name__ == "__main__":
    sys.stdout.write(markdown())
