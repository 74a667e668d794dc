"""Messages and plain prompts to token ids."""

import functools
import re
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

from service.errors import ContextTooLong
from service.errors import InvalidRequest
from service.text import templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Vocabulary:
    """What requests need to know of a tokenizer, read once: asking takes milliseconds.

    control: matches any special token; None if there is none. longest: characters in the longest
    token.
    """

    control: re.Pattern[str] | None
    longest: int


# Keeps the last tokenizers alive; a server has one, and two while it changes models.
@functools.lru_cache(maxsize=2)
def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    """Facts about a tokenizer. The same object gives the same answer without work."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    # Longest first, so that the message names the whole token where one token starts another.
    names = sorted(filter(None, special), key=len, reverse=True)
    control = re.compile("|".join(map(re.escape, names))) if names else None
    return Vocabulary(control, max(map(len, tokenizer.get_vocab()), default=1))


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    max_context: int,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Token ids of a conversation: `ids_of` what `render` makes of it, with what that raises."""
    return ids_of(tokenizer, render(tokenizer, messages, max_context, tools))


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    max_context: int,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of a conversation, by the model's own template, ready for an answer.

    messages: `role` and `content`, both text, and whatever else the template reads: text, and
    lists and objects of it. tools: what the model is told it may call.
    Raises InvalidRequest when the model has no template, when the template refuses the messages,
    or when they or the tools contain one of the model's control tokens (it would end the message
    and start another, in somebody else's name); ContextTooLong when the text cannot be
    `max_context` tokens or fewer, before any tokenising.
    """
    if tokenizer.chat_template is None:
        raise InvalidRequest(
            "this model has no chat template, so it cannot take messages",
            param="messages",
            hint="send a prompt to /v1/completions",
        )
    characters = 0
    control = vocabulary(tokenizer).control
    for where, text in _texts(messages, tools):
        characters += len(text)
        if control is not None and (found := control.search(text)):
            raise InvalidRequest(
                f"{where} contains {found[0]}, a control token of this model",
                param=where,
                hint="take it out, or write the whole prompt yourself for /v1/completions",
            )
    _refuse_endless(tokenizer, characters, max_context, "messages")
    text = templates.render(tokenizer, messages, tools)
    # The template may have added any amount.
    _refuse_endless(tokenizer, len(text), max_context, "messages")
    return text


def ids_of(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a rendered conversation, whose template wrote the control tokens itself."""
    return _ids(tokenizer, text, special=False)


def _texts(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Every text that a request brings, keys included, with the field that it is in."""
    fields = [
        (f"messages[{at}].{key}", value)
        for at, message in enumerate(messages)
        for key, value in message.items()
    ]
    for where, value in [*fields, *((f"tools[{at}]", tool) for at, tool in enumerate(tools))]:
        waiting = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str):
                yield where, item
            elif isinstance(item, Mapping):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                waiting += item


def encode_text(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, max_context: int, param: str = "prompt"
) -> list[int]:
    """Token ids of a prompt as it stands, control tokens and start token included.

    Raises ContextTooLong, before any tokenising, when the text cannot be `max_context` tokens or
    fewer.
    """
    _refuse_endless(tokenizer, len(prompt), max_context, param)
    return _ids(tokenizer, prompt, special=True)


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=special, verbose=False)
    return [int(token) for token in encoded["input_ids"]]


def _refuse_endless(
    tokenizer: "PreTrainedTokenizerBase", characters: int, max_context: int, param: str
) -> None:
    """A token has so many characters at most, so this many characters are more tokens than fit."""
    least = characters // vocabulary(tokenizer).longest
    if least > max_context:
        raise ContextTooLong(
            f"This model's maximum context length is {max_context} tokens. However, {param} has"
            f" {characters} characters, which are at least {least} tokens. Send less text.",
            param=param,
        )
