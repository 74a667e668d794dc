"""What a JSON value may be, said once: a shape checks values and writes itself as JSON Schema.

`check` returns what was given without what is ignored, so checking twice changes nothing. It adds
names that nobody specifies to `unknown`, and raises InvalidRequest, whose `param` says where the
first mistake is. `schema` is JSON Schema 2020-12, as OpenAPI 3.1 has it. Numbers and flags at the
top of a body are fields of pydantic models (`values.Typed`).
"""

import re
from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from service.errors import InvalidRequest
from service.errors import UnsupportedParameter
from service.web.body import short
from service.web.fields import OF_HARMLESS
from service.web.fields import keep_done
from service.web.values import Choice
from service.web.values import Only
from service.web.values import Schema
from service.web.values import Shape
from service.web.values import wrong

ANYTHING: Schema = {}


@dataclass(frozen=True)
class Array:
    item: Shape
    least: int = 0
    most: int | None = None

    @property
    def wanted(self) -> str:
        return "an array"

    def fits(self, given: Any) -> bool:
        return isinstance(given, list) and (not given or self.item.fits(given[0]))

    def check(self, where: str, given: Any, unknown: list[str]) -> list[Any]:
        found = _counted(where, given, self.least, self.most)
        return [self.item.check(f"{where}[{at}]", item, unknown) for at, item in enumerate(found)]

    def schema(self) -> Schema:
        return _array(self.item.schema(), self.least, self.most)


@dataclass(frozen=True)
class Ids:
    """Token ids, of which there may be millions. What the vocabulary has is looked at later."""

    least: int = 0
    most: int | None = None
    wanted: str = "an array of token ids"

    def fits(self, given: Any) -> bool:
        return isinstance(given, list) and (not given or type(given[0]) is int)

    def check(self, where: str, given: Any, unknown: list[str]) -> list[int]:
        found = _counted(where, given, self.least, self.most)
        for at, item in enumerate(found):
            if type(item) is not int:
                raise wrong(f"{where}[{at}]", "a token id", item)
        return found

    def schema(self) -> Schema:
        return _array({"type": "integer"}, self.least, self.most)


@dataclass(frozen=True)
class Table:
    """An object from names that match `pattern` to values. said: what such a name is."""

    pattern: str
    said: str
    value: Shape
    most: int
    wanted: str = "an object"

    def fits(self, given: Any) -> bool:
        return isinstance(given, dict)

    def check(self, where: str, given: Any, unknown: list[str]) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise wrong(where, self.wanted, given)
        if len(given) > self.most:
            said = f"{where} has {len(given)} entries; {self.most} are allowed"
            raise InvalidRequest(said, param=where)
        for name in given:
            if not re.fullmatch(self.pattern, name):
                said = f"{where} has the key {short(name)}, which is no {self.said}"
                raise InvalidRequest(said, param=where)
        return {k: self.value.check(f"{where}.{k}", v, unknown) for k, v in given.items()}

    def schema(self) -> Schema:
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^({self.pattern})$"},
            "additionalProperties": self.value.schema(),
            "maxProperties": self.most,
        }


@dataclass(frozen=True)
class Object:
    """An object of these fields, looked at in this order. null means absent.

    harmless, not_done: as `fields.keep_done` takes them. Other names are ignored and told.
    one_of: names of which at least one must be there.
    """

    done: Mapping[str, Shape]
    required: Collection[str] = ()
    harmless: Collection[str] = ()
    not_done: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    one_of: Collection[str] = ()
    said: str = ""
    wanted: str = "an object"

    def fits(self, given: Any) -> bool:
        return isinstance(given, dict)

    def check(self, where: str, given: Any, unknown: list[str]) -> dict[str, Any]:
        """where: "" for the body itself."""
        if not isinstance(given, dict):
            raise wrong(where, self.wanted, given)
        prefix = f"{where}." if where else ""
        kept, names = keep_done(given, self.done, self.harmless, self.not_done, prefix)
        unknown += names
        found = {}
        for name, shape in self.done.items():
            if name in kept:
                found[name] = shape.check(prefix + name, kept[name], unknown)
            elif name in self.required:
                if isinstance(shape, Only | Choice):
                    shape.check(prefix + name, None, unknown)
                raise InvalidRequest(f"{prefix}{name} is missing", param=prefix + name)
        if self.one_of and not any(found.get(name) for name in self.one_of):
            first = next(iter(self.one_of))
            if first not in found:
                raise InvalidRequest(f"{prefix}{first} is missing", param=prefix + first)
        return found

    def schema(self) -> Schema:
        properties = {
            name: shape.schema() if name in self.required else or_null(shape.schema())
            for name, shape in self.done.items()
        }
        properties |= {name: _nothing(values) for name, values in self.not_done.items()}
        properties |= {name: _harmless(name) for name in sorted(self.harmless)}
        found: Schema = {"type": "object", "properties": properties}
        if self.said:
            found["description"] = self.said
        if self.required:
            found["required"] = list(self.required)
        if self.one_of:
            found["anyOf"] = [self._present(name) for name in self.one_of]
        return found

    def _present(self, name: str) -> Schema:
        shape = self.done[name].schema()
        if shape.get("type") == "array":
            shape["minItems"] = 1
        return {"required": [name], "properties": {name: shape}}


@dataclass(frozen=True)
class Tagged:
    """One of several objects, told apart by the string in the field `tag`.

    not_done: known values of it that are refused.
    """

    tag: str
    objects: Mapping[str, Object]
    not_done: Collection[str] = ()
    wanted: str = "an object"

    def fits(self, given: Any) -> bool:
        return isinstance(given, dict)

    def check(self, where: str, given: Any, unknown: list[str]) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise wrong(where, self.wanted, given)
        at = f"{where}.{self.tag}"
        value = given.get(self.tag)
        if isinstance(value, str) and value in self.not_done:
            raise UnsupportedParameter(f"{at}: {value} is not done by this server", param=at)
        if len(self.objects) == 1:
            value = Only(next(iter(self.objects))).check(at, value, unknown)
        else:
            value = Choice(tuple(self.objects)).check(at, value, unknown)
        return self.objects[value].check(where, given, unknown)

    def schema(self) -> Schema:
        found = [shape.schema() for shape in self.objects.values()]
        return found[0] if len(found) == 1 else {"anyOf": found}


@dataclass(frozen=True)
class Either:
    """One of several shapes, told apart by the kind of value, for arrays by that of the first."""

    shapes: tuple[Shape, ...]
    wanted: str

    def fits(self, given: Any) -> bool:
        return any(shape.fits(given) for shape in self.shapes)

    def check(self, where: str, given: Any, unknown: list[str]) -> Any:
        for shape in self.shapes:
            if shape.fits(given):
                return shape.check(where, given, unknown)
        arrays = [shape for shape in self.shapes if isinstance(shape, Array | Ids)]
        if isinstance(given, list) and arrays:
            items = [s.item.wanted if isinstance(s, Array) else "a token id" for s in arrays]
            raise wrong(f"{where}[0]", " or ".join(items), given[0])
        raise wrong(where, self.wanted, given)

    def schema(self) -> Schema:
        return {"anyOf": [shape.schema() for shape in self.shapes]}


def or_null(schema: Schema) -> Schema:
    """The same, where null means absent."""
    if schema in (ANYTHING, {"type": "null"}):
        return schema
    outside: Schema = {name: schema[name] for name in ("default", "description") if name in schema}
    inside = {name: value for name, value in schema.items() if name not in outside}
    shapes = inside["anyOf"] if set(inside) == {"anyOf"} else [inside]
    null = {"type": "null"}
    return {**outside, "anyOf": shapes if null in shapes else [*shapes, null]}


def _counted(where: str, given: Any, least: int, most: int | None) -> list[Any]:
    if not isinstance(given, list):
        raise wrong(where, "an array", given)
    if len(given) < least:
        said = "is empty" if not given else f"has {len(given)} entries; give {least} or more"
        raise InvalidRequest(f"{where} {said}", param=where)
    if most is not None and len(given) > most:
        said = f"{where} has {len(given)} entries; {most} are allowed"
        raise InvalidRequest(said, param=where)
    return given


def _array(item: Schema, least: int, most: int | None) -> Schema:
    found: Schema = {"type": "array", "items": item}
    if least:
        found["minItems"] = least
    if most is not None:
        found["maxItems"] = most
    return found


def _harmless(name: str) -> Schema:
    found: Schema = {"description": "No effect."}
    inside = OF_HARMLESS.get(name)
    if inside:
        found["properties"] = {inner: _nothing(values) for inner, values in inside.items()}
    return found


def _nothing(values: tuple[Any, ...]) -> Schema:
    """A field that is not done: nothing but what asks for nothing."""
    said = "Not done: only what asks for nothing." if values else "Not done."
    return {"enum": [*values, None], "description": said}
