"""LangChain: https://python.langchain.com/docs/integrations/chat/openai/"""

import os

from langchain_core.messages import HumanMessage
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langchain_openai import OpenAI
from langchain_openai import OpenAIEmbeddings
from pydantic import BaseModel
from pydantic import Field

QUESTION = "What is the capital of France?"
PARIS = "The capital of France is Paris."

# OPENAI_BASE_URL=http://127.0.0.1:8000/v1 and OPENAI_API_KEY are read from the environment
llm = ChatOpenAI(model="smollm2-135m", temperature=0, max_tokens=60, stream_usage=True)

answer = llm.invoke([("system", "You are a helpful assistant."), ("human", QUESTION)])
assert "Paris" in answer.content
assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["input_tokens"]
print("invoke")

chunks = list(llm.stream(QUESTION))
assert "".join(chunk.content for chunk in chunks) == PARIS
assert len(chunks) > 5
assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 7
print("stream")

assert [answer.content for answer in llm.batch([QUESTION] * 4)] == [PARIS] * 4
print("batch")


@tool
def weather(city: str) -> str:
    """The weather in a city, now."""
    return f"Sunny in {city}, 25 degrees."


messages = [HumanMessage("What is the weather in Rome?")]
with_tools = llm.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False)
messages.append(with_tools.invoke(messages))
for call in messages[-1].tool_calls:
    assert call["name"] == "weather"
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    messages.append(result)
assert len(messages) == 3
assert llm.invoke(messages).content
gathered = None
for chunk in with_tools.stream(messages[:1]):
    gathered = chunk if gathered is None else gathered + chunk
assert gathered.tool_calls[0]["args"] == messages[1].tool_calls[0]["args"]
print("bind_tools")


class Capital(BaseModel):
    """A country and its capital."""

    country: str = Field(max_length=20)
    capital: str = Field(max_length=20)


for method in ("json_schema", "function_calling"):
    structured = llm.with_structured_output(Capital, method=method)
    assert isinstance(structured.invoke(QUESTION), Capital)
print("with_structured_output")

completed = OpenAI(model="smollm2-135m", temperature=0, max_tokens=5).invoke(
    "The capital of France is"
)
assert "Paris" in completed
print("completions")

by_responses = ChatOpenAI(model="smollm2-135m", temperature=0, use_responses_api=True)
assert by_responses.invoke(QUESTION).text == PARIS
assert "".join(chunk.text for chunk in by_responses.stream(QUESTION)) == PARIS
print("use_responses_api")

embeddings = OpenAIEmbeddings(
    model="all-minilm-l6-v2",
    base_url=os.environ["EMBEDDINGS_BASE_URL"],
    check_embedding_ctx_length=False,  # else it sends the ids of OpenAI's tokenizer
)
assert [len(row) for row in embeddings.embed_documents(["The sea.", "Tax"])] == [384, 384]
print("embeddings")
