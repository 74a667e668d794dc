"""Which request fields are done, accepted without effect, or refused.

What OpenAI (or vLLM, whose extensions clients use) specifies and would change the answer is done
or refused with 400 and `param`. docs/api.md has these tables, printed by
`python -m service.web.reference`.
"""

import json
from collections.abc import Collection
from collections.abc import Mapping
from typing import Any

from service.errors import InvalidRequest
from service.errors import UnsupportedParameter
from service.web.body import PARAM
from service.web.body import short

# Fields that change nothing about the answer: accepted, whatever they hold but OF_HARMLESS.
HARMLESS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "user",
    }
)

# Of harmless fields that are objects: what in them would change the answer all the same. A request
# that prewarms a cache at OpenAI gets an empty answer, one that compares gets a diagnosis.
OF_HARMLESS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "prompt_cache_options": {"comparison_response_id": (), "prewarm": (False,)},
}

# Field -> values that ask for nothing. With any other value the field is refused. null is always
# nothing.
_NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    # OpenAI
    "store": (False,),
    # vLLM
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

CHAT_NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    **_NOT_DONE,
    "add_special_tokens": (False,),
    "audio": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}

COMPLETION_NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    **_NOT_DONE,
    "add_special_tokens": (True,),
    "max_completion_tokens": (),
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}

EMBEDDING_NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    # vLLM
    "add_special_tokens": (True,),
    "add_generation_prompt": (False,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "embed_dtype": ("float32",),
    "endianness": ("little",),
    "messages": (),
    "mm_processor_kwargs": ({},),
    "normalize": (),
    "pooling": (),
    "priority": (0,),
    "softmax": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_activation": (),
    # of other servers and services that clients are switched between
    "input_type": (),
    "task": (),
    "truncate": (False, "NONE"),
}

# max_tool_calls counts calls of tools that the server runs itself, of which there are none.
RESPONSE_HARMLESS = (HARMLESS - {"metadata"}) | {"max_tool_calls"}
RESPONSE_NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    **CHAT_NOT_DONE,
    "access_programs": (),
    "background": (False,),
    "background_options": ({},),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "previous_response_id": (),
    "prompt": (),
    "truncation": ("disabled",),
    # names that these things have in a chat
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_tokens": (),
    "messages": (),
    "n": (1,),
    "response_format": ({"type": "text"},),
}

# Of a message.
MESSAGE_DONE = frozenset(
    {"role", "content", "name", "reasoning_content", "tool_call_id", "tool_calls"}
)
MESSAGE_HARMLESS = frozenset({"annotations"})
MESSAGE_NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "refusal": (),
}

# Of stream_options. The first two are done; the other only pads chunks against eavesdroppers.
STREAM_OPTIONS_DONE = frozenset({"include_usage", "continuous_usage_stats"})
STREAM_OPTIONS_HARMLESS = frozenset({"include_obfuscation"})


def keep_done(
    given: Mapping[str, Any],
    done: Collection[str],
    harmless: Collection[str],
    not_done: Mapping[str, tuple[Any, ...]],
    path: str = "",
) -> tuple[dict[str, Any], list[str]]:
    """The fields that are done, and the names nobody specifies. null means absent.

    Raises UnsupportedParameter for a field that is not done and asks for something.
    """
    kept: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in given.items():
        where = path + name
        if value is None or name in harmless:
            if name not in done and name not in harmless and name not in not_done:
                unknown.append(where)
            if name in OF_HARMLESS and isinstance(value, Mapping):
                keep_done(
                    value, (), value.keys() - OF_HARMLESS[name], OF_HARMLESS[name], f"{where}."
                )
        elif name in done:
            kept[name] = value
        elif name in not_done:
            if not any(_same(value, nothing) for nothing in not_done[name]):
                raise UnsupportedParameter(
                    f"{where} is not done by this server",
                    param=where,
                    hint=_way_out(not_done[name]),
                )
        else:
            unknown.append(where)
    return kept, unknown


def refuse_unknown(names: list[str]) -> None:
    """For `unknown_fields: refuse`."""
    if names:
        shown = ", ".join(short(name) for name in names[:10])
        raise InvalidRequest(f"unknown: {shown}", param=names[0][:PARAM])


def _way_out(nothing: tuple[Any, ...]) -> str:
    values = " or ".join(json.dumps(value) for value in nothing)
    return f"leave it out, or send {values}" if values else "leave it out"


def _same(value: Any, nothing: Any) -> bool:
    """Equal, where true is not 1 and 0.0 is 0."""
    return isinstance(value, bool) == isinstance(nothing, bool) and bool(value == nothing)
