"""Settings laid over each other, each value with its origin."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from service.config.origin import BUILT_IN
from service.config.origin import Origin

SERVER = "server."
"""Keys of the server block begin with this; all others are keys of a deployment."""


@dataclass(frozen=True)
class Setting:
    """One value that a layer sets.

    `key` is "server.bind", "model", ...; with `entry` only that entry of a mapping is set.
    `parts` are the origins of what is inside a value of the file: "options.device", "fallback[0]".
    """

    key: str
    value: Any
    origin: Origin
    entry: str | None = None
    parts: Mapping[str, Origin] = field(default_factory=dict)


@dataclass
class Values:
    """Plain values by key and their origins, while layers are being laid over them.

    `options_for` is the strategy that the current options were written for, None while no layer
    has said which strategy that is.
    """

    values: dict[str, Any]
    origins: dict[str, Origin]
    options_for: str | None = None
    notices: list[str] = field(default_factory=list)

    @staticmethod
    def built_in(values: Mapping[str, Any]) -> "Values":
        return Values(dict(values), dict.fromkeys(values, BUILT_IN))

    def block(self, *, server: bool) -> dict[str, Any]:
        """The values of the server block, or those of the deployment, by their own keys."""
        return {
            key.removeprefix(SERVER): value
            for key, value in self.values.items()
            if key.startswith(SERVER) is server
        }

    def close_file(self) -> None:
        """The layers of the file are in: options without a strategy were for the built-in one."""
        if self.options_for is None and self.values["options"]:
            self.options_for = str(self.values["strategy"])


def lay(below: Values, layer: Sequence[Setting]) -> None:
    """Lay one layer over the values. Later settings of a layer win over its earlier ones.

    Options belong to a strategy. A layer that chooses another strategy drops the options which
    were written for the old one, with a notice: they would be refused by the new strategy or,
    worse, mean something else to it.
    """
    for setting in layer:
        if setting.key == "strategy":
            _set(below, setting)
    strategy = below.values["strategy"]
    said = below.origins["strategy"] is not BUILT_IN
    if below.options_for not in (None, strategy) and below.values["options"]:
        if not any(s.key == "options" and s.entry is None for s in layer):
            here, chooser = below.origins["options"], below.origins["strategy"]
            below.notices.append(
                f"options from {here} were for the strategy {below.options_for} "
                f"and are dropped: {chooser} chooses {strategy}."
            )
        _set(below, Setting("options", {}, BUILT_IN))
    for setting in layer:
        if setting.key != "strategy":
            _set(below, setting)
    if any(s.key == "options" for s in layer):
        below.options_for = strategy if said else None


def _set(below: Values, setting: Setting) -> None:
    key = setting.key
    if setting.entry is not None:
        below.values[key] = {**below.values[key], setting.entry: setting.value}
        below.origins[f"{key}.{setting.entry}"] = setting.origin
    else:
        below.values[key] = setting.value
        for name in [n for n in below.origins if n.startswith((f"{key}.", f"{key}["))]:
            del below.origins[name]
        below.origins.update(setting.parts)
    below.origins[key] = setting.origin
