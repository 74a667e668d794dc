"""LiteLLM: https://docs.litellm.ai/docs/providers/openai_compatible"""

import asyncio
import os

import litellm
from pydantic import BaseModel
from pydantic import Field

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
litellm.suppress_debug_info = True  # else it writes hints to stdout
SERVER = {
    "model": "openai/smollm2-135m",  # "openai/" tells LiteLLM how to ask
    "api_base": os.environ["OPENAI_BASE_URL"],  # http://127.0.0.1:8000/v1
    "api_key": os.environ["OPENAI_API_KEY"],
}

answer = litellm.completion(messages=QUESTION, temperature=0, **SERVER)
assert answer.choices[0].message.content == PARIS
assert answer.usage.completion_tokens == 7
print("completion")

chunks = list(
    litellm.completion(
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        **SERVER,
    )
)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == PARIS
assert litellm.stream_chunk_builder(chunks).choices[0].message.content == PARIS
print("stream")


async def at_once():
    asked = [litellm.acompletion(messages=QUESTION, temperature=0, **SERVER) for _ in range(4)]
    return await asyncio.gather(*asked)


assert [answer.choices[0].message.content for answer in asyncio.run(at_once())] == [PARIS] * 4
print("acompletion")

weather = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city, now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}
messages = [{"role": "user", "content": "What is the weather in Rome?"}]
asked = litellm.completion(
    messages=messages,
    tools=[weather],
    tool_choice="required",
    parallel_tool_calls=False,
    temperature=0,
    **SERVER,
)
messages.append(asked.choices[0].message)
for call in asked.choices[0].message.tool_calls:
    assert call.function.name == "weather"
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "Sunny, 25 degrees."})
assert len(messages) == 3
answer = litellm.completion(messages=messages, temperature=0, max_tokens=40, **SERVER)
assert answer.choices[0].message.content
print("tools")


class Capital(BaseModel):
    country: str = Field(max_length=20)
    capital: str = Field(max_length=20)


answer = litellm.completion(messages=QUESTION, temperature=0, response_format=Capital, **SERVER)
Capital.model_validate_json(answer.choices[0].message.content)
print("response_format")

completed = litellm.text_completion(
    prompt="The capital of France is",
    temperature=0,
    max_tokens=5,
    **{**SERVER, "model": "text-completion-openai/smollm2-135m"},
)
assert "Paris" in completed.choices[0].text
print("text_completion")

embedded = litellm.embedding(
    model="openai/all-minilm-l6-v2",
    input=["The sea.", "Tax"],
    api_base=os.environ["EMBEDDINGS_BASE_URL"],
    api_key=SERVER["api_key"],
)
assert [len(one["embedding"]) for one in embedded.data] == [384, 384]
print("embedding")

try:
    litellm.completion(messages=[{"role": "user", "content": "sea " * 6000}], **SERVER)
except litellm.ContextWindowExceededError:
    print("errors")
