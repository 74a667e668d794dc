"""Request bodies to typed, checked values. After this module nothing is checked again."""

import re
from collections.abc import Mapping
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
from service.web.body import kind
from service.web.body import short

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
TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
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


AnyRequest = TypeVar("AnyRequest", bound=_Generation)
CHAT_DONE = frozenset(ChatRequest.model_fields)
COMPLETION_DONE = frozenset(CompletionRequest.model_fields) - {"prompts"} | {"prompt"}


def chat_request(body: Mapping[str, Any]) -> tuple[ChatRequest, list[str]]:
    """A chat request, and its names that nobody specifies. Raises InvalidRequest."""
    kept, unknown = fields.keep_done(body, CHAT_DONE, fields.HARMLESS, fields.CHAT_NOT_DONE)
    _require(kept, "model", "messages")
    kept["messages"] = _messages(kept["messages"], unknown)
    kept |= formats.checked(kept, unknown)
    request = _checked(ChatRequest, kept, unknown)
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
    kept, unknown = fields.keep_done(
        body, COMPLETION_DONE, fields.HARMLESS, fields.COMPLETION_NOT_DONE
    )
    _require(kept, "model", "prompt")
    kept["prompts"] = _prompts(kept.pop("prompt"))
    request = _checked(CompletionRequest, kept, unknown)
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


def _checked(model: type[AnyRequest], kept: dict[str, Any], unknown: list[str]) -> AnyRequest:
    if "stop" in kept:
        kept["stop"] = _stops(kept["stop"])
    if "stop_token_ids" in kept:
        kept["stop_token_ids"] = _stop_ids(kept["stop_token_ids"])
    if "logit_bias" in kept:
        kept["logit_bias"] = _biases(kept["logit_bias"])
    if "stream_options" in kept:
        kept["stream_options"] = _stream_options(kept["stream_options"], unknown)
        if kept.get("stream", False) is False:
            raise InvalidRequest(
                "stream_options is for streams only; set stream to true", param="stream_options"
            )
    try:
        return model.model_validate(kept)
    except ValidationError as error:
        raise _plain(error) from error


def _require(kept: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name not in kept:
            raise InvalidRequest(f"{name} is missing", param=name)


def _messages(given: Any, unknown: list[str]) -> tuple[Message, ...]:
    if not isinstance(given, list):
        raise _wrong("messages", "an array", given)
    if not given:
        raise InvalidRequest("messages is empty; send at least one", param="messages")
    if len(given) > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages has {len(given)} entries; {MAX_MESSAGES} are allowed", param="messages"
        )
    parts = sum(len(m["content"]) for m in given if _has_parts(m))
    if parts > MAX_PARTS:
        raise InvalidRequest(
            f"the messages have {parts} content parts; {MAX_PARTS} are allowed", param="messages"
        )
    return tuple(_message(f"messages[{at}]", item, unknown) for at, item in enumerate(given))


def _has_parts(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("content"), list)


def _message(where: str, given: Any, unknown: list[str]) -> Message:
    if not isinstance(given, dict):
        raise _wrong(where, "an object", given)
    role = given.get("role")
    if role == "function":
        raise UnsupportedParameter(
            f"{where}.role: {role} messages are not done by this server", param=f"{where}.role"
        )
    if not isinstance(role, str) or role not in ROLES:
        found = "missing" if role is None else short(role) if isinstance(role, str) else kind(role)
        raise InvalidRequest(
            f"{where}.role is {found}; give one of {', '.join(ROLES)}", param=f"{where}.role"
        )
    kept, names = fields.keep_done(
        given, fields.MESSAGE_DONE, fields.MESSAGE_HARMLESS, fields.MESSAGE_NOT_DONE, f"{where}."
    )
    unknown += names
    message = {"role": ROLES[role], **formats.of_message(where, role, kept, unknown)}
    if "content" not in kept and "tool_calls" in message:
        kept["content"] = ""
    message["content"] = _content(f"{where}.content", kept.get("content"))
    if "name" in kept:
        if not isinstance(kept["name"], str):
            raise _wrong(f"{where}.name", "a string", kept["name"])
        message["name"] = kept["name"]
    return message


def _content(where: str, given: Any) -> str:
    """Text as it stands, or text parts joined by line ends, as other servers join them."""
    if isinstance(given, str):
        return given
    if given is None:
        raise InvalidRequest(f"{where} is missing", param=where)
    if not isinstance(given, list):
        raise _wrong(where, "a string or an array of text parts", given)
    texts = []
    for at, part in enumerate(given):
        if not isinstance(part, dict):
            raise _wrong(f"{where}[{at}]", "an object", part)
        if part.get("type") != "text":
            found = part.get("type")
            name = short(found) if isinstance(found, str) else "without a type"
            raise UnsupportedParameter(
                f"{where}[{at}] is {name}; this server takes text parts only",
                param=f"{where}[{at}]",
            )
        if not isinstance(part.get("text"), str):
            raise _wrong(f"{where}[{at}].text", "a string", part.get("text"))
        texts.append(part["text"])
    return "\n".join(texts)


def _prompts(given: Any) -> tuple[str | tuple[int, ...], ...]:
    """One or several prompts, each text or token ids."""
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list):
        raise _wrong("prompt", "a string, an array of strings, or token ids", given)
    if not given:
        raise InvalidRequest("prompt is empty", param="prompt")
    if type(given[0]) is int:
        return (_token_ids("prompt", given),)
    if len(given) > MAX_PROMPTS:
        raise InvalidRequest(
            f"prompt has {len(given)} prompts; {MAX_PROMPTS} are allowed", param="prompt"
        )
    first = type(given[0])
    for at, item in enumerate(given):
        if not isinstance(item, str | list) or type(item) is not first:
            wanted = kind(given[0]) if at else "a string or an array of token ids"
            raise _wrong(f"prompt[{at}]", wanted, item)
    return tuple(
        item if isinstance(item, str) else _token_ids(f"prompt[{at}]", item)
        for at, item in enumerate(given)
    )


def _token_ids(where: str, given: list[Any]) -> tuple[int, ...]:
    if not given:
        raise InvalidRequest(f"{where} is empty", param=where)
    for at, item in enumerate(given):
        if type(item) is not int:
            raise _wrong(f"{where}[{at}]", "a token id", item)
    return tuple(given)


def _stops(given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list):
        raise _wrong("stop", "a string or an array of strings", given)
    if len(given) > MAX_STOPS:
        raise InvalidRequest(
            f"stop has {len(given)} strings; {MAX_STOPS} are allowed", param="stop"
        )
    for at, item in enumerate(given):
        if not isinstance(item, str):
            raise _wrong(f"stop[{at}]", "a string", item)
        if not 1 <= len(item) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"stop[{at}] has {len(item)} characters; give 1 to {MAX_STOP_CHARACTERS}",
                param=f"stop[{at}]",
            )
    return tuple(given)


def _stop_ids(given: Any) -> tuple[int, ...]:
    if not isinstance(given, list):
        raise _wrong("stop_token_ids", "an array of token ids", given)
    if len(given) > MAX_STOP_TOKENS:
        raise InvalidRequest(
            f"stop_token_ids has {len(given)} ids; {MAX_STOP_TOKENS} are allowed",
            param="stop_token_ids",
        )
    for at, item in enumerate(given):
        if type(item) is not int:
            raise _wrong(f"stop_token_ids[{at}]", "a token id", item)
    return tuple(given)


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(given, dict):
        raise _wrong("logit_bias", "an object", given)
    if len(given) > MAX_BIASES:
        raise InvalidRequest(
            f"logit_bias has {len(given)} entries; {MAX_BIASES} are allowed", param="logit_bias"
        )
    found = []
    for token, bias in given.items():
        if not TOKEN_ID.fullmatch(token):
            raise InvalidRequest(
                f"logit_bias has the key {short(token)}, which is no token id", param="logit_bias"
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise _wrong(f"logit_bias.{token}", "a number", bias)
        if not -100 <= bias <= 100:
            raise InvalidRequest(
                f"logit_bias.{token} is {bias}; give -100 to 100", param=f"logit_bias.{token}"
            )
        found.append((int(token), float(bias)))
    return tuple(found)


def _stream_options(given: Any, unknown: list[str]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise _wrong("stream_options", "an object", given)
    kept, names = fields.keep_done(
        given, fields.STREAM_OPTIONS_DONE, fields.STREAM_OPTIONS_HARMLESS, {}, "stream_options."
    )
    unknown += names
    return kept


def _wrong(where: str, wanted: str, given: Any) -> InvalidRequest:
    return InvalidRequest(f"{where} must be {wanted}, not {kind(given)}", param=where)


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
        return _wrong(param, WANTED[found["type"]], found["input"])
    if found["type"] in BOUNDS:
        bound, words = BOUNDS[found["type"]]
        limit = words.format(
            f"{found['ctx'][bound]:g}" if found["ctx"][bound] < 1000 else found["ctx"][bound]
        )
        return InvalidRequest(f"{param} is {found['input']}; give {limit}", param=param)
    if found["type"] == "string_too_short":
        return InvalidRequest(f"{param} is empty", param=param)
    return InvalidRequest(f"{param}: {found['msg']}", param=param)
