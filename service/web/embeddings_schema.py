"""The body of a request to /v1/embeddings: its shape, and what it asks for."""

from collections.abc import Mapping
from typing import Any
from typing import Literal

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field

from service.web import fields
from service.web import schemas
from service.web.shapes import Array
from service.web.shapes import Either
from service.web.shapes import Ids
from service.web.shapes import Object
from service.web.values import Choice
from service.web.values import Text
from service.web.values import Typed

MAX_INPUTS = 2048  # OpenAI's

INPUT = Either(
    (
        Text(least=1),
        Ids(least=1),
        Array(Text(least=1), least=1, most=MAX_INPUTS),
        Array(Ids(least=1), least=1, most=MAX_INPUTS),
    ),
    wanted="a string, an array of strings, or token ids",
)


class EmbeddingRequest(BaseModel):
    """`inputs` holds text or token ids; the ids are not yet compared with the vocabulary.

    dimensions: None is all that the model gives.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    model: str = Field(min_length=1)
    inputs: tuple[str | tuple[int, ...], ...]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=schemas.INT32_MAX)


DONE = frozenset(EmbeddingRequest.model_fields) - {"inputs"} | {"input"}
EMBEDDING = Object(
    {
        "model": Typed(EmbeddingRequest, "model"),
        "input": INPUT,
        "encoding_format": Choice(("float", "base64")),
        "dimensions": Typed(EmbeddingRequest, "dimensions"),
    },
    ["model", "input"],
    fields.HARMLESS,
    fields.EMBEDDING_NOT_DONE,
)


def embedding_request(body: Mapping[str, Any]) -> tuple[EmbeddingRequest, list[str]]:
    """A request for embeddings, and its names that nobody specifies. Raises InvalidRequest."""
    unknown: list[str] = []
    kept = EMBEDDING.check("", body, unknown)
    given = kept.pop("input")
    several = isinstance(given, list) and not isinstance(given[0], int)
    kept["inputs"] = tuple(
        item if isinstance(item, str) else tuple(item) for item in (given if several else [given])
    )
    return schemas.checked(EmbeddingRequest, kept), unknown
