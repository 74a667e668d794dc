"""MOORAGE_*: every key of the config as an environment variable, and a few of their own."""

import re
from collections.abc import Mapping
from pathlib import Path

from service.config import text_values
from service.config.layers import SERVER
from service.config.layers import Setting
from service.config.origin import Origin
from service.config.suggesting import closest
from service.errors import Problem

PREFIX = "MOORAGE_"

OWN = {
    "MOORAGE_CONFIG": "The config file. Default: `./moorage.yaml` if it is there.",
    "MOORAGE_DEPLOYMENT": "Which block of `deployments` runs.",
    "MOORAGE_API_KEYS": "API keys, `KEY` or `NAME: KEY`, separated by commas. "
    "They win over `server.api_keys_file`.",
    "MOORAGE_API_KEY": "The key that `moorage bench` and `moorage chat` send; else OPENAI_API_KEY.",
    "MOORAGE_CACHE": "Folder for fetched models. "
    "Default: `$XDG_CACHE_HOME/moorage`, else `~/.cache/moorage`.",
    "MOORAGE_DEBUG": "Any value: commands show the traceback of an unexpected error.",
}
"""Variables that are no key of the config."""

COLLECTOR = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Where spans go, as every OpenTelemetry SDK reads it. One that is set turns `tracing` on."""

KUBERNETES = re.compile(
    r"MOORAGE(_[A-Z0-9_]+)?_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?"
    r"|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
KUBERNETES_PORT = re.compile(r"MOORAGE(_[A-Z0-9_]+)?_PORT")
KUBERNETES_URL = re.compile(r"(tcp|udp|sctp)://")


def name_of(key: str) -> str:
    """ "server.bind" -> "MOORAGE_BIND"."""
    return PREFIX + key.removeprefix(SERVER).upper()


def keys_by_name() -> dict[str, str]:
    """Variable -> key, for every key of a deployment and of the server block."""
    keys = (*text_values.deployment_keys(), *text_values.server_keys())
    return {name_of(key): key for key in keys}


def settings(env: Mapping[str, str]) -> tuple[list[Setting], list[Problem], list[str]]:
    """The MOORAGE_* layer: settings, problems and notices. An empty value is not set.

    Unknown variables are problems, so that a misspelt one cannot be overlooked. Those that
    Kubernetes makes for a service whose name begins with "moorage" are none of ours: a notice.
    """
    found: list[Setting] = []
    problems: list[Problem] = []
    foreign: list[str] = []
    keys = keys_by_name()
    for name in sorted(n for n in env if n.startswith(PREFIX) and env[n].strip()):
        if name in OWN:
            continue
        if name in keys:
            good, bad = text_values.setting(keys[name], env[name].strip(), Origin("env", name))
            found += good
            problems += bad
        elif _from_kubernetes(name, env[name]):
            foreign.append(name)
        else:
            problems.append(Problem(f"env {_shown(name)}", "", _unknown(name, (*keys, *OWN))))
    notices = (
        [f"{', '.join(foreign)}: ignored, made by Kubernetes for a service."] if foreign else []
    )
    return found, problems, notices


def of_others(env: Mapping[str, str]) -> list[Setting]:
    """What variables say that are not ours, below the file: OpenTelemetry's collector."""
    names = [name for name in COLLECTOR if given(env, name)]
    return [Setting("server.tracing", "on", Origin("env", name)) for name in names[:1]]


def given(env: Mapping[str, str], name: str) -> str | None:
    """The variable's value, or None if it is not set or empty."""
    return env.get(name, "").strip() or None


def cache(env: Mapping[str, str]) -> tuple[Path, Origin]:
    """The cache folder, absolute, and which variable says so.

    Raises RuntimeError when it needs a home folder and there is none.
    """
    if text := given(env, "MOORAGE_CACHE"):
        return Path(text).expanduser().absolute(), Origin("env", "MOORAGE_CACHE")
    xdg = Path(given(env, "XDG_CACHE_HOME") or "-")
    if xdg.is_absolute():  # the specification says to ignore a relative one
        return xdg / "moorage", Origin("env", "XDG_CACHE_HOME")
    home = given(env, "HOME")
    return (Path(home) if home else Path.home()) / ".cache" / "moorage", Origin("built-in")


def client_key(env: Mapping[str, str]) -> str | None:
    """The API key that this machine's clients send."""
    return given(env, "MOORAGE_API_KEY") or given(env, "OPENAI_API_KEY")


def _from_kubernetes(name: str, value: str) -> bool:
    if KUBERNETES.fullmatch(name):
        return True
    return bool(KUBERNETES_PORT.fullmatch(name) and KUBERNETES_URL.match(value))


def _unknown(name: str, valid: tuple[str, ...]) -> str:
    if name in ("MOORAGE_HOST", "MOORAGE_PORT"):
        return "unknown variable; the address is MOORAGE_BIND, for example 127.0.0.1:8000"
    found = closest(name, valid)
    return "unknown variable" + (f"; did you mean {found}?" if found else "")


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)
