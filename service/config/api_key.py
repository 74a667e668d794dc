"""One API key and its name."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import SecretStr
from pydantic import StringConstraints

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

KeyName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


@dataclass(frozen=True)
class ApiKey:
    """A secret and who it stands for. The name is shown in logs and headers, the key never."""

    name: str
    key: SecretStr
