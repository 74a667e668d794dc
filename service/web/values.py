"""Single JSON values, each said once: see `service.web.shapes`, which puts them together."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol

from pydantic import BaseModel

from service.errors import InvalidRequest
from service.errors import UnsupportedParameter
from service.web.body import kind
from service.web.body import short

Schema = dict[str, Any]


class Shape(Protocol):
    """One kind of JSON value. wanted: in words, with its article."""

    @property
    def wanted(self) -> str: ...

    def fits(self, given: Any) -> bool:
        """Whether this is the shape that is meant, mistakes inside aside."""

    def check(self, where: str, given: Any, unknown: list[str]) -> Any: ...

    def schema(self) -> Schema: ...


@dataclass(frozen=True)
class Text:
    """A string. said: what `pattern`, which the whole text must match, means."""

    least: int = 0
    most: int | None = None
    pattern: str | None = None
    said: str = ""
    wanted: str = "a string"
    more: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, given: Any) -> bool:
        return isinstance(given, str)

    def check(self, where: str, given: Any, unknown: list[str]) -> str:
        if not isinstance(given, str):
            raise wrong(where, self.wanted, given)
        if len(given) < self.least or (self.most is not None and len(given) > self.most):
            allowed = f"{self.least} to {self.most}" if self.most else f"{self.least} or more"
            said = f"has {len(given)} characters; give {allowed}" if given else "is empty"
            raise InvalidRequest(f"{where} {said}", param=where)
        if self.pattern is not None and not re.fullmatch(self.pattern, given):
            raise InvalidRequest(f"{where} is {short(given)}; give {self.said}", param=where)
        return given

    def schema(self) -> Schema:
        found: Schema = {"type": "string"}
        if self.least:
            found["minLength"] = self.least
        if self.most is not None:
            found["maxLength"] = self.most
        if self.pattern is not None:
            found["pattern"] = f"^({self.pattern})$"
        return {**found, **self.more}


@dataclass(frozen=True)
class Choice:
    """One of these strings."""

    values: tuple[str, ...]

    @property
    def wanted(self) -> str:
        return f"one of {', '.join(self.values)}"

    def fits(self, given: Any) -> bool:
        return isinstance(given, str)

    def check(self, where: str, given: Any, unknown: list[str]) -> str:
        if not isinstance(given, str) or given not in self.values:
            found = "missing" if given is None else kind(given)
            found = short(given) if isinstance(given, str) else found
            raise InvalidRequest(f"{where} is {found}; give {self.wanted}", param=where)
        return given

    def schema(self) -> Schema:
        return {"type": "string", "enum": list(self.values)}


@dataclass(frozen=True)
class Only:
    """One string; any other is something that is not done."""

    value: str

    @property
    def wanted(self) -> str:
        return self.value

    def fits(self, given: Any) -> bool:
        return isinstance(given, str)

    def check(self, where: str, given: Any, unknown: list[str]) -> str:
        if given != self.value:
            found = short(given) if isinstance(given, str) else "missing"
            raise UnsupportedParameter(
                f"{where} is {found}; this server takes {self.value} only", param=where
            )
        return self.value

    def schema(self) -> Schema:
        return {"type": "string", "const": self.value}


@dataclass(frozen=True)
class Flag:
    wanted: str = "true or false"

    def fits(self, given: Any) -> bool:
        return isinstance(given, bool)

    def check(self, where: str, given: Any, unknown: list[str]) -> bool:
        if not isinstance(given, bool):
            raise wrong(where, self.wanted, given)
        return given

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Number:
    least: float
    most: float
    wanted: str = "a number"

    def fits(self, given: Any) -> bool:
        return isinstance(given, int | float) and not isinstance(given, bool)

    def check(self, where: str, given: Any, unknown: list[str]) -> float:
        if not self.fits(given):
            raise wrong(where, self.wanted, given)
        if not self.least <= given <= self.most:
            said = f"{where} is {given}; give {self.least:g} to {self.most:g}"
            raise InvalidRequest(said, param=where)
        return float(given)

    def schema(self) -> Schema:
        return {"type": "number", "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True)
class AnyObject:
    """An object whose inside is looked at elsewhere, such as a JSON schema."""

    wanted: str = "an object"

    def fits(self, given: Any) -> bool:
        return isinstance(given, dict)

    def check(self, where: str, given: Any, unknown: list[str]) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise wrong(where, self.wanted, given)
        return given

    def schema(self) -> Schema:
        return {"type": "object"}


@dataclass(frozen=True)
class Refused:
    """A field that is right elsewhere. why: as the end of a sentence that it begins."""

    why: str
    wanted: str = "left out"

    def fits(self, given: Any) -> bool:
        return False

    def check(self, where: str, given: Any, unknown: list[str]) -> Any:
        raise InvalidRequest(f"{where} {self.why}", param=where)

    def schema(self) -> Schema:
        return {"type": "null"}


@dataclass(frozen=True)
class Typed:
    """A field of a pydantic model, which checks it later together with the others."""

    model: type[BaseModel]
    name: str
    wanted: str = ""

    def fits(self, given: Any) -> bool:
        return True

    def check(self, where: str, given: Any, unknown: list[str]) -> Any:
        return given

    def schema(self) -> Schema:
        found: Schema = dict(self.model.model_json_schema()["properties"][self.name])
        found.pop("title", None)
        if found.get("default", {}) is None:
            del found["default"]
        return found


def wrong(where: str, wanted: str, given: Any) -> InvalidRequest:
    """The error for a value of the wrong kind."""
    if given is None:
        return InvalidRequest(f"{where} is missing", param=where)
    return InvalidRequest(f"{where or 'the body'} must be {wanted}, not {kind(given)}", param=where)
