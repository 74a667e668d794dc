"""Request bodies to typed, checked values. After this module nothing is checked again."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import TypeVar

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import ValidationError

from service.errors import InvalidRequest
from service.errors import UnsupportedParameter
from service.web import fields
from service.web import formats
from service.web.shapes import Array
from service.web.shapes import Either
from service.web.shapes import Ids
from service.web.shapes import Object
from service.web.shapes import Table
from service.web.shapes import Tagged
from service.web.values import Flag
from service.web.values import Number
from service.web.values import Only
from service.web.values import Refused
from service.web.values import Shape
from service.web.values import Text
from service.web.values import Typed
from service.web.values import wrong

MAX_MESSAGES = 1024
MAX_PARTS = 1024
MAX_PROMPTS = 128
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 128
MAX_CHOICES = 128
MAX_BIASES = 1024
MAX_LOGPROBS = 20  # the engine's
COMPLETION_TOKENS = 16  # what OpenAI specifies for /v1/completions when max_tokens is left out

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
# written in the one way that JSON writes a number, so that no id occurs twice
ID_PATTERN = "0|[1-9][0-9]{0,9}"
Message = Mapping[str, Any]  # text, but for `tool_calls`
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


class _Model(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


class StreamOptions(_Model):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Generation(_Model):
    """What both kinds of request share."""

    model: str = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    # None: what the model's publisher recommends.
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    min_tokens: int = Field(0, ge=0, le=INT32_MAX)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class ChatRequest(_Generation):
    messages: tuple[Message, ...]
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    # see service.web.formats, which has checked them
    response_format: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | tuple[str] = "auto"
    parallel_tool_calls: bool = True

    @property
    def reported(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None tells nothing."""
        return self.top_logprobs if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer; None is what the context has left."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens


class CompletionRequest(_Generation):
    """`prompts` holds text or token ids; the ids are not yet compared with the vocabulary."""

    prompts: tuple[str | tuple[int, ...], ...]
    # 0 with `echo` only
    max_tokens: int | None = Field(None, ge=0, le=INT32_MAX)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def reported(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None tells nothing."""
        return self.logprobs

    @property
    def limit(self) -> int:
        """Tokens of each answer."""
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


AnyRequest = TypeVar("AnyRequest", bound=BaseModel)
CHAT_DONE = frozenset(ChatRequest.model_fields)
COMPLETION_DONE = frozenset(CompletionRequest.model_fields) - {"prompts"} | {"prompt"}

STOP = Text(least=1, most=MAX_STOP_CHARACTERS)
SHARED: Mapping[str, Shape] = {
    "stop": Either((STOP, Array(STOP, most=MAX_STOPS)), wanted="a string or an array of strings"),
    "stop_token_ids": Ids(most=MAX_STOP_TOKENS),
    "logit_bias": Table(ID_PATTERN, "token id", Number(-100, 100), most=MAX_BIASES),
    "stream_options": Object(
        {name: Flag() for name in fields.STREAM_OPTIONS_DONE},
        harmless=fields.STREAM_OPTIONS_HARMLESS,
        said="For streams only.",
    ),
}
CONTENT = Either(
    (
        Text(),
        Array(
            Tagged(
                "type", {"text": Object({"type": Only("text"), "text": Text()}, ["type", "text"])}
            )
        ),
    ),
    wanted="a string or an array of text parts",
)
# fields of messages, with the one role that has them
_OWNED: Mapping[str, tuple[str, Shape]] = {
    "tool_calls": ("assistant", formats.CALLS),
    "reasoning_content": ("assistant", Text()),
    "tool_call_id": ("tool", Text()),
}


def _role(role: str) -> Object:
    """A message of this role."""
    own: dict[str, Shape] = {"role": Only(role), "content": CONTENT, "name": Text()}
    for name, (owner, shape) in _OWNED.items():
        own[name] = shape if role == owner else Refused(f"is for messages of the role {owner}")
    required = {"assistant": ["role"], "tool": ["role", "content", "tool_call_id"]}
    return Object(
        own,
        required.get(role, ["role", "content"]),
        fields.MESSAGE_HARMLESS,
        fields.MESSAGE_NOT_DONE,
        one_of=("content", "tool_calls") if role == "assistant" else (),
    )


MESSAGES = Array(
    Tagged("role", {role: _role(role) for role in ROLES}, not_done={"function"}),
    least=1,
    most=MAX_MESSAGES,
)
PROMPT = Either(
    (
        Text(),
        Ids(least=1),
        Array(Text(), least=1, most=MAX_PROMPTS),
        Array(Ids(least=1), least=1, most=MAX_PROMPTS),
    ),
    wanted="a string, an array of strings, or token ids",
)


def _body(
    model: type[BaseModel], first: Mapping[str, Shape], not_done: Mapping[str, tuple[Any, ...]]
) -> Object:
    """The shape of a body: what `first` and SHARED do not say is a field of the model."""
    own = {**first, **SHARED}
    rest = {n: Typed(model, n) for n in model.model_fields if n not in own and n != "prompts"}
    return Object({**own, **rest}, list(first)[:2], fields.HARMLESS, not_done)


CHAT = _body(
    ChatRequest,
    {
        "model": Typed(ChatRequest, "model"),
        "messages": MESSAGES,
        "response_format": formats.RESPONSE_FORMAT,
        "tools": formats.TOOLS,
        "tool_choice": formats.TOOL_CHOICE,
    },
    fields.CHAT_NOT_DONE,
)
COMPLETION = _body(
    CompletionRequest,
    {"model": Typed(CompletionRequest, "model"), "prompt": PROMPT},
    fields.COMPLETION_NOT_DONE,
)


def chat_request(body: Mapping[str, Any]) -> tuple[ChatRequest, list[str]]:
    """A chat request, and its names that nobody specifies. Raises InvalidRequest."""
    unknown: list[str] = []
    kept = CHAT.check("", body, unknown)
    kept["messages"] = _messages(kept["messages"])
    kept |= formats.read(kept)
    request = checked(ChatRequest, kept)
    both = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(both) == 2:
        raise InvalidRequest(
            "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens"
        )
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest(
            "top_logprobs is for answers with logprobs; set logprobs to true",
            param="top_logprobs",
        )
    return request, unknown


def completion_request(body: Mapping[str, Any]) -> tuple[CompletionRequest, list[str]]:
    """A completion request, and its names that nobody specifies. Raises InvalidRequest."""
    unknown: list[str] = []
    kept = COMPLETION.check("", body, unknown)
    kept["prompts"] = _prompts(kept.pop("prompt"))
    request = checked(CompletionRequest, kept)
    if request.best_of not in (None, request.n):
        raise UnsupportedParameter(
            f"best_of is {request.best_of}, and n is {request.n}; this server shows every answer"
            " that it makes",
            param="best_of",
            hint="leave best_of out, or send the same as n",
        )
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest(
            "max_tokens is 0; give 1 or more, or set echo to true", param="max_tokens"
        )
    return request, unknown


def checked(model: type[AnyRequest], kept: dict[str, Any]) -> AnyRequest:
    """Fields that have their shapes, as a request. Raises InvalidRequest."""
    if "stop" in kept:
        kept["stop"] = (kept["stop"],) if isinstance(kept["stop"], str) else tuple(kept["stop"])
    if "stop_token_ids" in kept:
        kept["stop_token_ids"] = tuple(kept["stop_token_ids"])
    if "logit_bias" in kept:
        kept["logit_bias"] = tuple((int(i), bias) for i, bias in kept["logit_bias"].items())
    if "stream_options" in kept and kept.get("stream", False) is False:
        raise InvalidRequest(
            "stream_options is for streams only; set stream to true", param="stream_options"
        )
    try:
        return model.model_validate(kept)
    except ValidationError as error:
        raise _plain(error) from error


def _messages(given: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    parts = sum(len(m["content"]) for m in given if isinstance(m.get("content"), list))
    if parts > MAX_PARTS:
        raise InvalidRequest(
            f"the messages have {parts} content parts; {MAX_PARTS} are allowed", param="messages"
        )
    return tuple(_message(f"messages[{at}]", item) for at, item in enumerate(given))


def _message(where: str, given: Mapping[str, Any]) -> Message:
    """As chat templates want it: text joined by line ends, as other servers join it."""
    content = given.get("content", "")
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content)
    message = {**given, "role": ROLES[given["role"]], "content": content}
    if given.get("tool_calls"):
        message["tool_calls"] = formats.calls(f"{where}.tool_calls", given["tool_calls"])
    else:
        message.pop("tool_calls", None)
    return message


def _prompts(given: Any) -> tuple[str | tuple[int, ...], ...]:
    """One or several prompts, each text or token ids."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given[0], int):
        return (tuple(given),)
    return tuple(item if isinstance(item, str) else tuple(item) for item in given)


WANTED: Mapping[str, str] = {
    "bool_type": "true or false",
    "float_type": "a number",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "string_type": "a string",
}
Bound = Literal["ge", "gt", "le"]
BOUNDS: Mapping[str, tuple[Bound, str]] = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "{} or less"),
}


def _plain(error: ValidationError) -> InvalidRequest:
    """The first finding, as a sentence without pydantic's words."""
    found = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in found["loc"])
    if found["type"] in WANTED:
        return wrong(param, WANTED[found["type"]], found["input"])
    if found["type"] in BOUNDS:
        bound, words = BOUNDS[found["type"]]
        limit = words.format(
            f"{found['ctx'][bound]:g}" if found["ctx"][bound] < 1000 else found["ctx"][bound]
        )
        return InvalidRequest(f"{param} is {found['input']}; give {limit}", param=param)
    if found["type"] == "string_too_short":
        return InvalidRequest(f"{param} is empty", param=param)
    return InvalidRequest(f"{param}: {found['msg']}", param=param)
