"""`moorage reload`: the running server takes up its configuration as it is now."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from typing import Any

import typer

from service.cli import options
from service.cli import report
from service.cli import terminal
from service.config.environment import process_environment
from service.config.reading import load_process
from service.errors import ControlFailed
from service.errors import ServiceError

Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket", metavar="PATH", help="The server's control socket. Default: by the config."
    ),
]
Drain = Annotated[
    bool | None,
    typer.Option(
        "--drain/--no-drain",
        help="Let the old model go before the new one is loaded, or never do. "
        "Default: only where both do not fit.",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Load again although the configuration is the same.")
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Begin, and do not wait for the end.")]

WAYS = {
    "begun": "The reload has begun; GET /placement and the log say how it goes.",
    "unchanged": "Nothing has changed; {model} serves on. --force loads it again.",
    "settings": "Changed without a load: {changed}. {model} serves on.",
    "beside": "{model} of deployment {deployment} serves, {seconds:.1f} s.",
    "drained": "{model} of deployment {deployment} serves, {seconds:.1f} s; "
    "the old model was let go before it was loaded.",
}


@report.guard
def reload(
    config: options.Config = None,
    deployment: options.Deployment = None,
    bind: options.Bind = None,
    socket: Socket = None,
    drain: Drain = None,
    force: Force = False,
    no_wait: NoWait = False,
    as_json: options.AsJson = False,
) -> None:
    """Have the running server read its configuration again and serve what it says.

    The server reads the file, variables and flags it was started with; --config and --bind only say
    which server is meant. Exit status as of `serve`; when it is not 0, the old model serves, unless
    the message says otherwise.
    """
    from service.config import control_socket

    path = socket
    if path is None:
        server = load_process(options.flags(config, bind=bind, deployment=deployment)).server
        path = server.control_socket
        if path is None and server.bind.endswith(":0"):
            raise ControlFailed(
                f"server.bind is {server.bind}: any free port, so the socket is not known",
                hint="give --socket with the path that the server's log names",
            )
        if path is None:
            path = control_socket.default_path(server.bind, process_environment())
    request = {
        "command": "reload",
        "deployment": deployment,
        "drain": drain,
        "force": force,
        "wait": not no_wait,
    }
    with _progress(as_json=as_json) as tell:
        result = _result(control_socket.ask(path, request), tell)
    _end(result, as_json=as_json)


def _progress(*, as_json: bool) -> contextlib.AbstractContextManager[Callable[[str, float], None]]:
    return contextlib.nullcontext(lambda doing, share: None) if as_json else terminal.progress()


def _result(
    messages: Iterable[Mapping[str, Any]], tell: Callable[[str, float], None]
) -> dict[str, Any]:
    """The last message of the server, once what comes before has been told. Raises its error."""
    doing, share = "asking the server", 0.0
    for message in messages:
        if "error" in message:
            raise _error(message)
        if "result" in message:
            result: dict[str, Any] = message["result"]
            return result
        progress = message["progress"]
        doing, share = progress.get("doing") or doing, progress.get("share", share)
        tell(doing, share)
    raise ControlFailed("the server ended the conversation without a result")


def _end(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        report.print_json(result)
        return
    given = {**result, "changed": ", ".join(result.get("changed", ()))}
    typer.echo(WAYS[result["way"]].format(**given))
    for warning in result.get("warnings", ()):
        terminal.say(f"warning: {warning}", report.STYLES, stderr=True)


def _error(message: Mapping[str, Any]) -> ServiceError:
    """The server's error, as if it were this command's."""
    told = message["error"]
    error = ServiceError(
        told["message"], hint=told.get("hint"), failure_class=told.get("failure_class")
    )
    error.code, error.type = told["code"], told["type"]
    error.exit_status = message["exit_status"]
    return error
