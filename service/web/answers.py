"""What answers look like, for the OpenAPI document; a test compares real answers with it.

An object has these keys and no others, unless it says that it may have more.
"""

from typing import Any
from typing import Literal
from typing import NotRequired

from pydantic import with_config
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12


class ErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: str
    failure_class: NotRequired[str]
    tensors: NotRequired[list[str]]
    hint: NotRequired[str]


class Error(TypedDict):
    """The one shape of every error."""

    error: ErrorObject


State = Literal[
    "planned", "loading", "validating", "ready", "idle", "degraded", "draining", "failed"
]


class NotReadyError(TypedDict):
    """Not ready: how far it is, beside the error."""

    error: ErrorObject
    state: State
    progress: float


class Live(TypedDict):
    status: Literal["live"]


class Ready(TypedDict):
    status: Literal["ready"]
    state: State
    model: str


@with_config({"extra": "allow"})
class Placement(TypedDict):
    """Plan, certificate, devices and what was tried. It may have more."""

    object: Literal["placement"]
    schema: Literal[1]
    state: State
    progress: float
    deployment: NotRequired[str]
    model: NotRequired[dict[str, Any]]
    strategy: NotRequired[dict[str, Any]]
    origin: NotRequired[dict[str, Any]]
    kv: NotRequired[dict[str, Any]]
    activity: NotRequired[dict[str, int] | None]
    engine: NotRequired[dict[str, Any]]
    devices: NotRequired[list[dict[str, Any]]]
    certificate: NotRequired[dict[str, Any] | None]
    watch: NotRequired[dict[str, Any]]
    attempts: NotRequired[list[dict[str, Any]]]
    warnings: NotRequired[list[Any]]
    error: NotRequired[ErrorObject]


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    context_length: int
    embedding_dimension: NotRequired[int]
    capabilities: dict[str, bool]


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Embedding(TypedDict):
    """Numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(TypedDict):
    prompt: str


class PromptDetails(TypedDict):
    cached_tokens: int


class CompletionDetails(TypedDict):
    reasoning_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: NotRequired[CompletionDetails]


class CalledFunction(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChosenLogprob]
    refusal: None


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: NotRequired[str]


class ToolCallDelta(TypedDict):
    """The id, the type and the name come first, the arguments in pieces."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    refusal: NotRequired[None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(TypedDict):
    """One event of a streamed chat. Choices are empty in the last one if usage was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(TypedDict):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(TypedDict):
    """One event of a streamed completion. Choices are empty in the last one with usage."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage | None]
