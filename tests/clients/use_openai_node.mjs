// The official Node client: https://github.com/openai/openai-node

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = "smollm2-135m";
const messages = [{ role: "user", content: "What is the capital of France?" }];
const PARIS = "The capital of France is Paris.";

// OPENAI_BASE_URL=http://127.0.0.1:8000/v1 and OPENAI_API_KEY are read from the environment
const client = new OpenAI();

const models = [];
for await (const one of client.models.list()) models.push(one.id);
assert.deepEqual(models, [model]);
console.log("models");

const answer = await client.chat.completions.create({ model, messages, temperature: 0 });
assert.equal(answer.choices[0].message.content, PARIS);
assert.ok(answer._request_id);
console.log("chat");

let text = "";
const stream = await client.chat.completions.create({
  model,
  messages,
  temperature: 0,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
assert.equal(text, PARIS);
const runner = client.chat.completions.stream({ model, messages, temperature: 0 });
assert.equal((await runner.finalChatCompletion()).choices[0].finish_reason, "stop");
assert.equal(await runner.finalContent(), PARIS);
console.log("stream");

const two = await client.chat.completions.create({
  model,
  messages,
  temperature: 0,
  n: 2,
  logprobs: true,
  top_logprobs: 2,
});
for (const choice of two.choices) {
  assert.equal(choice.logprobs.content.map((token) => token.token).join(""), PARIS);
}
assert.equal(two.choices.length, 2);
console.log("n and logprobs");

const Capital = z.object({ country: z.string().max(20), capital: z.string().max(20) });
const parsed = await client.chat.completions.parse({
  model,
  messages,
  temperature: 0,
  response_format: zodResponseFormat(Capital, "capital"),
});
Capital.parse(parsed.choices[0].message.parsed);
console.log("parse");

// calls the function and asks again with its result, until the model answers in words
const asked = [];
const weather = {
  name: "weather",
  description: "The weather in a city, now.",
  parameters: {
    type: "object",
    properties: { city: { type: "string", maxLength: 20 } },
    required: ["city"],
  },
  parse: JSON.parse,
  function: ({ city }) => {
    asked.push(city);
    return `Sunny in ${city}, 25 degrees.`;
  },
};
const tools = client.chat.completions.runTools(
  {
    model,
    messages: [{ role: "user", content: "What is the weather in Rome?" }],
    tools: [{ type: "function", function: weather }],
    tool_choice: { type: "function", function: { name: "weather" } },
    parallel_tool_calls: false,
    temperature: 0,
    max_tokens: 60,
  },
);
await tools.done();
assert.equal(asked.length, 1);
assert.equal(typeof asked[0], "string");
console.log("runTools");

const completion = await client.completions.create({
  model,
  prompt: "The capital of France is",
  max_tokens: 1,
  temperature: 0,
  echo: true,
  logprobs: 1,
});
assert.equal(completion.choices[0].text, "The capital of France is Paris");
console.log("completions with echo");

const response = await client.responses.create({ model, input: messages, temperature: 0 });
assert.equal(response.output_text, PARIS);
const events = client.responses.stream({ model, input: messages, temperature: 0 });
let delta = "";
events.on("response.output_text.delta", (event) => (delta += event.delta));
assert.equal((await events.finalResponse()).output_text, PARIS);
assert.equal(delta, PARIS);
console.log("responses");

// a server with `model: all-minilm-l6-v2`; the client asks for base64 and reads it
const encoder = new OpenAI({ baseURL: process.env.EMBEDDINGS_BASE_URL });
const embedded = await encoder.embeddings.create({ model: "all-minilm-l6-v2", input: "The sea." });
assert.ok(Math.abs(Math.hypot(...embedded.data[0].embedding) - 1) < 1e-3);
console.log("embeddings");

await assert.rejects(
  client.chat.completions.create({ model, messages, store: true }),
  (error) =>
    error instanceof OpenAI.BadRequestError &&
    error.param === "store" &&
    error.code === "unsupported_parameter",
);
await assert.rejects(
  client.chat.completions.create(
    { model, messages: [{ role: "user", content: "Tell a long story." }], max_tokens: 2000 },
    { timeout: 500, maxRetries: 0 },
  ),
  OpenAI.APIConnectionTimeoutError,
);
console.log("errors and timeouts");
