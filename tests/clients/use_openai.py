"""The official Python client: https://github.com/openai/openai-python"""

import asyncio
import math
import os

import openai
from pydantic import BaseModel
from pydantic import Field

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."

# OPENAI_BASE_URL=http://127.0.0.1:8000/v1 and OPENAI_API_KEY are read from the environment
client = openai.OpenAI()

assert [model.id for model in client.models.list()] == [MODEL]
assert client.models.retrieve(MODEL).object == "model"
print("models")

answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
assert answer.choices[0].message.content == PARIS
print("chat")

text = ""
stream = client.chat.completions.create(
    model=MODEL,
    messages=QUESTION,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        text += choice.delta.content or ""
assert text == PARIS
assert chunk.usage.completion_tokens == answer.usage.completion_tokens
print("stream")

answer = client.chat.completions.create(
    model=MODEL, messages=QUESTION, temperature=0, n=2, logprobs=True, top_logprobs=2
)
for choice in answer.choices:
    assert "".join(token.token for token in choice.logprobs.content) == PARIS
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
assert len(answer.choices) == 2
print("n and logprobs")


class Capital(BaseModel):
    country: str = Field(max_length=20)
    capital: str = Field(max_length=20)


answer = client.chat.completions.parse(
    model=MODEL, messages=QUESTION, temperature=0, response_format=Capital
)
assert isinstance(answer.choices[0].message.parsed, Capital)
print("parse")


class Weather(BaseModel):
    """The weather in a city, now."""

    city: str = Field(max_length=20)


messages = [{"role": "user", "content": "What is the weather in Rome?"}]
tools = [openai.pydantic_function_tool(Weather)]
asked = client.chat.completions.parse(
    model=MODEL,
    messages=messages,
    tools=tools,
    tool_choice="required",
    parallel_tool_calls=False,
    temperature=0,
)
messages.append(asked.choices[0].message)
for call in asked.choices[0].message.tool_calls:
    assert isinstance(call.function.parsed_arguments, Weather)
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "Sunny, 25 degrees."})
answer = client.chat.completions.create(
    model=MODEL, messages=messages, tools=tools, tool_choice="none", temperature=0, max_tokens=40
)
assert answer.choices[0].message.content
print("tools")

answer = client.completions.create(
    model=MODEL,
    prompt="The capital of France is",
    max_tokens=1,
    temperature=0,
    echo=True,
    logprobs=1,
)
told = answer.choices[0].logprobs
assert answer.choices[0].text == "".join(told.tokens) == "The capital of France is Paris"
assert told.token_logprobs[0] is None
print("completions with echo")

answer = client.responses.create(model=MODEL, input=QUESTION, temperature=0)
assert answer.output_text == PARIS
with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as events:
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events.get_final_response().output_text == PARIS
answer = client.responses.parse(
    model=MODEL, input=QUESTION, temperature=0, text_format=Capital, max_output_tokens=100
)
assert isinstance(answer.output_parsed, Capital)
print("responses")

# a server with `model: all-minilm-l6-v2`
encoder = client.with_options(base_url=os.environ["EMBEDDINGS_BASE_URL"])
answer = encoder.embeddings.create(
    model="all-minilm-l6-v2", input=["The sea.", "The ocean.", "Tax"]
)
sea, ocean, tax = (one.embedding for one in answer.data)
assert math.isclose(math.hypot(*sea), 1, abs_tol=1e-3)
assert math.dist(sea, ocean) < math.dist(sea, tax)
print("embeddings")

try:
    client.chat.completions.create(model=MODEL, messages=QUESTION, store=True)
except openai.BadRequestError as error:
    refused = error
assert (refused.param, refused.code) == ("store", "unsupported_parameter")
print("errors")


async def at_once():
    async with openai.AsyncOpenAI() as client:
        asked = [
            client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
            for _ in range(4)
        ]
        return await asyncio.gather(*asked)


assert [answer.choices[0].message.content for answer in asyncio.run(at_once())] == [PARIS] * 4
print("async")
