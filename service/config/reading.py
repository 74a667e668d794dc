"""The operator's words become one frozen Config.

Layers, later wins: built-in, `defaults`, `deployments.<name>`, DEVICE_MAP and QUANTIZE, MOORAGE_*,
flags. (The chosen strategy's own defaults belong between the first two; the placement registry
puts them there, because it knows the strategies. Variables that are not ours, OTEL_*, are there
as well.)
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from service.config import api_keys
from service.config import checking
from service.config import file_layers
from service.config import old_names
from service.config import paths
from service.config import text_values
from service.config import variables
from service.config.address import is_loopback
from service.config.api_key import ApiKey
from service.config.environment import process_environment
from service.config.file_layers import ConfigFile
from service.config.flags import Flags
from service.config.layers import SERVER
from service.config.layers import Setting
from service.config.layers import Values
from service.config.layers import lay
from service.config.origin import BUILT_IN
from service.config.origin import Origin
from service.config.schema import Config
from service.config.schema import DeploymentConfig
from service.config.schema import ServerConfig
from service.errors import ConfigError
from service.errors import Problem

__all__ = ["Flags", "again", "find", "load", "load_process"]

DEFAULT_FILE = "moorage.yaml"

Block = TypeVar("Block", bound=BaseModel)


def load_process(flags: Flags) -> Config:
    """The configuration of this process: its environment, its working directory, these flags.

    Raises ConfigError with every mistake found.
    """
    env = process_environment()
    return load(find(env, flags), env, flags)


def again(config: Config, deployment: str | None = None) -> Config:
    """The same configuration, read now: the same flags, this process's environment, the file as it
    is. deployment: another one of its blocks. Raises ConfigError with every mistake found.
    """
    env = process_environment()
    flags = config.flags
    if deployment is not None:
        flags = replace(flags, deployment=deployment)
    return load(config.path or find(env, flags), env, flags)


def find(env: Mapping[str, str], flags: Flags) -> Path | None:
    """The file to read: --config, else MOORAGE_CONFIG, else ./moorage.yaml if there is one."""
    if flags.config is not None:
        return flags.config
    if named := variables.given(env, "MOORAGE_CONFIG"):
        return Path(named)
    here = Path(DEFAULT_FILE)
    return here if here.exists() or here.is_symlink() else None


def load(
    path: Path | None,
    env: Mapping[str, str],
    flags: Flags,
    *,
    accelerator: Callable[[], bool] = old_names.accelerator_present,
) -> Config:
    """The configuration that this file, these variables and these flags say together.

    path: the file, or None for the embedded default. accelerator: asked only when DEVICE_MAP is
    none or off. Besides the file it reads the API keys' file and asks for the working directory.
    Raises ConfigError with every mistake found.
    """
    problems: list[Problem] = []
    file = _file(path, problems)
    old, found = old_names.settings(env, accelerator)
    new, more, notices = variables.settings(env)
    problems += [*found, *more]
    flagged: list[Setting] = []
    for key, text, flag in flags.settings:
        good, bad = text_values.setting(key, text, Origin("flag", flag))
        flagged += good
        problems += bad
    choice = None if file is None else _choose(file, env, flags, problems)
    if problems or file is None or choice is None:
        raise ConfigError(problems)
    name, chosen_by = choice

    values = _built_in()
    lay(values, variables.of_others(env))
    folder = Path.cwd() if path is None else path.expanduser().absolute().parent
    for layer in file.layers(name):
        lay(values, _located(layer, folder, problems))
    values.close_file()
    below = dict(values.origins)
    for layer in (old, new, flagged):
        lay(values, _located(layer, Path.cwd(), problems))
    server = _validated(ServerConfig, values, problems)
    deployment = _validated(DeploymentConfig, values, problems)
    cache = _cache(env, values.origins, problems)
    if deployment is not None:
        problems += _too_few_kv_tokens(deployment, values.origins)
    if problems or server is None or deployment is None or cache is None:
        raise ConfigError(problems)

    notices += _about_old_names(old, below, values.origins)
    notices += values.notices
    values.origins["deployment"] = chosen_by
    keys = _api_keys(env, server, values.origins, notices)
    if not keys and not is_loopback(server.bind):
        notices.append(
            f"server.bind is {server.bind} ({values.origins['server.bind']}) and there is no API "
            "key: whoever reaches it may use it. Set MOORAGE_API_KEYS or server.api_keys_file."
        )
    notices += _limits_of_nobody(server, keys, values.origins)
    absolute = None if path is None else path.expanduser().absolute()
    return Config(
        absolute,
        name,
        server,
        deployment,
        values.origins,
        tuple(notices),
        file.deployments,
        cache,
        keys,
        flags,
    )


def _file(path: Path | None, problems: list[Problem]) -> ConfigFile | None:
    if path is None:
        return ConfigFile()
    try:
        return file_layers.read(path)
    except ConfigError as error:
        problems.extend(error.problems)
        return None


def _choose(
    file: ConfigFile, env: Mapping[str, str], flags: Flags, problems: list[Problem]
) -> tuple[str, Origin] | None:
    """The deployment's name and who chose it; None after adding why it cannot be said."""
    shown = None if file.document is None else file.document.name
    choices = (
        (flags.deployment, Origin("flag", "--deployment")),
        (variables.given(env, "MOORAGE_DEPLOYMENT"), Origin("env", "MOORAGE_DEPLOYMENT")),
        (file.chosen, file.origin("deployment")),
    )
    given = [(name, origin) for name, origin in choices if name is not None]
    wrong = [
        Problem(origin.where(), "", file_layers.no_deployment(name, file.deployments, shown))
        for name, origin in given
        if name not in file.deployments
    ]
    problems += wrong
    if given:
        return None if wrong else given[0]
    if len(file.deployments) == 1:
        return file.deployments[0], file.origin("deployments", file.deployments[0])
    text = (
        f"deployment is missing, and there are several: {', '.join(file.deployments)}. Choose one "
        "with a line `deployment: NAME`, --deployment or MOORAGE_DEPLOYMENT"
    )
    origin = file.origin("deployments")
    problems.append(Problem(origin.where(), "deployment", text, origin.source, origin.column))
    return None


def _built_in() -> Values:
    server = ServerConfig().model_dump(mode="json")
    deployment = DeploymentConfig().model_dump(mode="json")
    return Values.built_in({**{SERVER + key: value for key, value in server.items()}, **deployment})


def _located(layer: Sequence[Setting], folder: Path, problems: list[Problem]) -> list[Setting]:
    """The layer with absolute paths; a path that cannot be one is a problem."""
    located: list[Setting] = []
    for setting in layer:
        try:
            located.append(paths.absolute(setting, folder))
        except ValueError as error:
            problems.append(_at(setting.origin, setting.key, str(error)))
    return located


def _validated(model: type[Block], values: Values, problems: list[Problem]) -> Block | None:
    """The block, frozen. Each layer was checked before; what is found now came of joining them."""
    of_server = model is ServerConfig
    block, mistakes = checking.check(model, values.block(server=of_server))
    prefix = SERVER if of_server else ""
    for mistake in mistakes:
        origin = values.origins[f"{prefix}{mistake.key[0]}"]
        problems.append(_at(origin, prefix + str(mistake.key[0]), prefix + mistake.text()))
    return block


def _too_few_kv_tokens(
    deployment: DeploymentConfig, origins: Mapping[str, Origin]
) -> list[Problem]:
    """One sequence must be able to use its whole context. Known only once the layers are joined."""
    tokens, context = deployment.kv_tokens, deployment.max_context
    if tokens is None or tokens >= context:
        return []
    said = f"kv_tokens is {tokens}; give {context} (max_context) or more"
    return [_at(origins["kv_tokens"], "kv_tokens", said)]


def _cache(
    env: Mapping[str, str], origins: dict[str, Origin], problems: list[Problem]
) -> Path | None:
    try:
        folder, origins["cache"] = variables.cache(env)
    except RuntimeError:
        said = "the cache needs a home folder and there is none; name a folder in MOORAGE_CACHE"
        problems.append(Problem("env MOORAGE_CACHE", "", said))
        return None
    return folder


def _about_old_names(
    old: Sequence[Setting], below: Mapping[str, Origin], now: Mapping[str, Origin]
) -> list[str]:
    return [
        old_names.notice(setting.origin.name, below[setting.key], now[setting.key])
        for setting in old
        if setting.entry is None
    ]


def _api_keys(
    env: Mapping[str, str], server: ServerConfig, origins: dict[str, Origin], notices: list[str]
) -> tuple[ApiKey, ...]:
    """The keys; where they came from goes to `origins`. The environment wins, with a notice."""
    file, origin = server.api_keys_file, origins["server.api_keys_file"]
    if text := variables.given(env, "MOORAGE_API_KEYS"):
        origins["api_keys"] = Origin("env", "MOORAGE_API_KEYS")
        if file is not None:
            notices.append(f"MOORAGE_API_KEYS is set; the keys in {file} ({origin}) are not used.")
        return api_keys.from_variable(text)
    origins["api_keys"] = BUILT_IN if file is None else origin
    if file is None:
        return ()
    keys, more = api_keys.from_file(file, origin)
    notices.extend(more)
    return keys


def _limits_of_nobody(
    server: ServerConfig, keys: Sequence[ApiKey], origins: Mapping[str, Origin]
) -> list[str]:
    """A misspelt name in key_limits would leave its key without limits, and nobody would see it."""
    names = {key.name for key in keys} | ({api_keys.DEFAULT} if keys else set())
    unused = [name for name in server.key_limits if name not in names]
    if not unused:
        return []
    where = origins["server.key_limits"]
    return [f"server.key_limits ({where}) has {', '.join(unused)}: no API key has that name."]


def _at(origin: Origin, key: str, message: str) -> Problem:
    return Problem(origin.where(), key, message, origin.source, origin.column)
