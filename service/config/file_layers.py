"""moorage.yaml: checked as a whole, then handed out as the layers of one deployment."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from service.config import checking
from service.config import yaml_file
from service.config.layers import SERVER
from service.config.layers import Setting
from service.config.origin import BUILT_IN
from service.config.origin import Origin
from service.config.schema import FileConfig
from service.config.suggesting import valid_are
from service.config.yaml_file import Document
from service.config.yaml_file import Key
from service.errors import ConfigError
from service.errors import Problem

EMBEDDED = "default"
"""The name of the deployment that runs without a file."""

BLOCKS = ("server", "defaults", "deployments")
SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}")


@dataclass(frozen=True)
class ConfigFile:
    """What a file says, checked. Without a file: one deployment in which everything is built in."""

    document: Document | None = None
    content: Mapping[str, Any] = field(default_factory=dict)
    deployments: tuple[str, ...] = (EMBEDDED,)

    @property
    def chosen(self) -> str | None:
        """The deployment the file itself chooses."""
        name: str | None = self.content.get("deployment")
        return name

    def origin(self, *key: str) -> Origin:
        return BUILT_IN if self.document is None else self.document.origin(key)

    def layers(self, deployment: str) -> list[list[Setting]]:
        """What it sets for this deployment: server, `defaults`, the deployment's own block."""
        if self.document is None:
            return []
        return [
            _settings(self.document, self.content.get("server", {}), ("server",), SERVER),
            _settings(self.document, self.content.get("defaults", {}), ("defaults",)),
            _settings(
                self.document,
                self.content["deployments"][deployment],
                ("deployments", deployment),
            ),
        ]


def read(path: Path) -> ConfigFile:
    """The file at `path`, every deployment of it checked.

    Raises ConfigError with every mistake, in the order of the lines.
    """
    try:
        document = yaml_file.read(path.expanduser(), shown(path))
    except RuntimeError:
        raise ConfigError([Problem(str(path), "", "there is no such home folder")]) from None
    if document.value is None:
        said = "the file is empty; `moorage config init --force` writes a starter"
        raise ConfigError([*document.problems, document.problem((), said)])
    if not isinstance(document.value, dict):
        said = f"the file is {yaml_file.describe(document.value)}; it must be keys and values"
        raise ConfigError([*document.problems, document.problem((), said)])
    content = _without_empty_blocks(document.value)
    _, mistakes = checking.check(FileConfig, content)
    problems = [
        *document.problems,
        *(document.problem(m.key, m.text(), show=not m.secret) for m in mistakes),
        *_secrets(document, content, ()),
        *_unknown_choice(document, content),
    ]
    if problems:
        raise ConfigError(sorted(problems, key=_position))
    return ConfigFile(document, content, tuple(content["deployments"]))


def shown(path: Path) -> str:
    """The path as it was given, or shorter when it is below the working directory."""
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _settings(
    document: Document, block: Mapping[str, Any], at: Key, prefix: str = ""
) -> list[Setting]:
    return [
        Setting(
            prefix + key,
            value,
            document.origin((*at, key)),
            parts=_parts(document, prefix + key, (*at, key)),
        )
        for key, value in block.items()
    ]


def _parts(document: Document, name: str, at: Key) -> dict[str, Origin]:
    inside = (spot for spot in document.spots if len(spot) > len(at) and spot[: len(at)] == at)
    return {yaml_file.dotted((name, *spot[len(at) :])): document.origin(spot) for spot in inside}


def _without_empty_blocks(content: dict[str, Any]) -> dict[str, Any]:
    """A block whose lines are all commented out is null in YAML; here it is an empty block."""
    filled = {k: {} if v is None and k in BLOCKS else v for k, v in content.items()}
    blocks = filled.get("deployments")
    if isinstance(blocks, dict):
        filled["deployments"] = {k: {} if v is None else v for k, v in blocks.items()}
    return filled


def _secrets(document: Document, value: Any, at: Key) -> list[Problem]:
    """Tokens of known shape, wherever they stand."""
    if isinstance(value, str) and SECRET_VALUE.search(value):
        said = "looks like a secret; put it in env HF_TOKEN or MOORAGE_API_KEYS, not in this file"
        return [document.problem(at, said, show=False)]
    if isinstance(value, dict):
        return [p for key, part in value.items() for p in _secrets(document, part, (*at, key))]
    if isinstance(value, list):
        return [p for i, part in enumerate(value) for p in _secrets(document, part, (*at, i))]
    return []


def _unknown_choice(document: Document, content: Mapping[str, Any]) -> list[Problem]:
    name, blocks = content.get("deployment"), content.get("deployments")
    if not isinstance(name, str) or not isinstance(blocks, dict) or name in blocks or not name:
        return []
    return [document.problem(("deployment",), no_deployment(name, tuple(blocks), document.name))]


def no_deployment(name: str, deployments: tuple[str, ...], file: str | None) -> str:
    place = "without a config file" if file is None else f"in {file}"
    return f"there is no deployment {name!r} {place}{valid_are(name, deployments)}"


def _position(problem: Problem) -> tuple[int, int]:
    _, line, column = problem.where.rsplit(":", 2)
    return int(line), int(column)
