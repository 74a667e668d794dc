"""Chat templates in three families' manner of calling tools, short. Each is one string."""

from typing import Any

from tests.support.tiny import tiny_tokenizer

HERMES = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n<tools>' }}"
    "{%- for tool in tools %}{{- '\n' }}"
    "{{- tool | tojson }}"
    "{%- endfor %}{{- '\n</tools><|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + messag"
    "e.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- if message.tool_calls %}"
    "{%- for tool_call in message.tool_calls %}"
    "{%- if (loop.first and message.content) or (not loop.first) %}{{- '\n' }}"
    '{%- endif %}{{- \'<tool_call>\n{"name": "\' + tool_call.function.name + \'", "argume'
    "nts\": ' + (tool_call.function.arguments | tojson) + '}\n</tool_call>' }}"
    "{%- endfor %}"
    "{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- endif %}"
)

LLAMA = (
    "{%- if tools %}{{- '<|im_start|>system\nFunctions:' }}"
    "{%- for tool in tools %}{{- tool | tojson(indent=4) }}"
    "{%- endfor %}{{- '<|im_end|>' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role=='tool' %}{{- '<|im_start|>ipython\n' + message.content|tojso"
    "n + '<|im_end|>' }}"
    "{%- elif message.tool_calls %}"
    "{%- if message.tool_calls|length != 1 %}{{ raise_exception('one call only') }}"
    '{%- endif %}{{- \'<|im_start|>assistant\n\n{"name": "\' + message.tool_calls[0].func'
    'tion.name + \'", "parameters": \' }}'
    "{{- message.tool_calls[0].function.arguments | tojson }}"
    "{{- '}<|im_end|>' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n\n' + message.content + '<|im_en"
    "d|>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}"
    "{%- endif %}"
)

MISTRAL = (
    "{%- for message in messages %}"
    "{%- if message.role=='user' %}"
    "{%- if tools %}{{- '[AVAILABLE_TOOLS] ' + tools|tojson + '[/AVAILABLE_TOOLS]' }}"
    "{%- endif %}{{- '[INST] ' + message.content + '[/INST]' }}"
    "{%- elif message.role=='tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + message.cont"
    "ent|tojson + ', \"call_id\": \"' + message.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- elif message.tool_calls %}{{- '[TOOL_CALLS] [' }}"
    "{%- for tool_call in message.tool_calls %}"
    "{%- set out = tool_call.function|tojson %}{{- out[:-1] }}"
    "{{- ', \"id\": \"' + tool_call.id + '\"}' }}"
    "{%- if not loop.last %}{{- ', ' }}"
    "{%- else %}{{- ']<|im_end|>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- else %}{{- ' ' + message.content + '<|im_end|>' }}"
    "{%- endif %}"
    "{%- endfor %}"
)

TEMPLATES = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL}


def tool_tokenizer(family: str) -> Any:
    """The byte tokenizer with a template that knows tools."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


def weather(*, strict: bool = False) -> dict[str, Any]:
    """A tool with one argument."""
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    function = {"name": "weather", "description": "Now.", "parameters": parameters}
    return {"type": "function", "function": {**function, "strict": strict}}
