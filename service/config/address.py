"""`server.bind`: HOST:PORT, [IPV6]:PORT or unix:PATH."""

import ipaddress
import os
import re
from pathlib import Path

HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*")
LONGEST_SOCKET_PATH = 107
"""Bytes; the kernel's sun_path has 108 with the closing zero."""


def check_bind(text: str) -> str:
    """The address unchanged. Raises ValueError saying what is wrong and what is right."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.strip() or path.endswith("/"):
            raise ValueError("has no socket path; write for example unix:/run/moorage.sock")
        if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
            raise ValueError(f"has a socket path longer than {LONGEST_SOCKET_PATH} bytes")
        return text
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError("has no port; write for example 127.0.0.1:8000")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65_535:
        raise ValueError(f"has the port {port!r}; give 1 to 65535, or 0 for any free port")
    if not host:
        raise ValueError(
            f"has no host; write 127.0.0.1:{port}, or 0.0.0.0:{port} for every interface"
        )
    if not _is_host(host):
        raise ValueError(
            f"has the host {host!r}; give a name, an IPv4 address or an IPv6 address in brackets"
        )
    return text


def check_origin(text: str) -> str:
    """A web origin unchanged, or "*". Raises ValueError saying what is right."""
    if text == "*":
        return text
    scheme, colon, rest = text.partition("://")
    host, _, port = rest.rpartition(":") if re.search(r":[0-9]+$", rest) else (rest, "", "80")
    if not colon or scheme not in ("http", "https") or not _is_host(host) or len(port) > 5:
        raise ValueError(
            f"has {text!r}, which is no web origin; write https://app.example, with a port if it "
            "has one and without a path, or '*'"
        )
    if text != text.lower():
        raise ValueError(f"has {text!r}; write it in lower case, as browsers send it")
    return text


def is_loopback(bind: str) -> bool:
    """Whether only this machine can reach the address: loopback or a Unix socket.

    `bind` has passed `check_bind`. A name other than localhost counts as reachable.
    """
    if bind.startswith("unix:"):
        return True
    host = bind.rpartition(":")[0].strip("[]")
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def under(bind: str, folder: Path) -> str:
    """The address with a relative socket path made absolute below `folder`."""
    if not bind.startswith("unix:"):
        return bind
    return f"unix:{folder / Path(bind.removeprefix('unix:')).expanduser()}"


def _is_host(host: str) -> bool:
    try:
        if host.startswith("[") and host.endswith("]"):
            ipaddress.IPv6Address(host[1:-1])
            return True
        if re.fullmatch(r"[0-9.]+", host):
            ipaddress.IPv4Address(host)
            return True
    except ValueError:
        return False
    return len(host) <= 253 and HOST_NAME.fullmatch(host) is not None
