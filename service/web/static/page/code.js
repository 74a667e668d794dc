// A request as something to paste elsewhere. The key is never in it: a variable stands for it.
import { byId, make, say } from "./dom.js";
import { hasKey } from "./server.js";

const address = (path) => new URL(path, location.href).href;

export function curl(path, body) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $MOORAGE_API_KEY"` : "";
  const stream = body.stream ? " --no-buffer" : "";
  return `curl${stream} ${address(path)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${quoted}'\n`;
}

const CALLS = {
  "v1/chat/completions": ["client.chat.completions.create", "print(chunk.choices[0].delta.content or \"\", end=\"\")"],
  "v1/completions": ["client.completions.create", "print(chunk.choices[0].text, end=\"\")"],
  "v1/embeddings": ["client.embeddings.create", ""],
};

export function python(path, body) {
  const [call, print] = CALLS[path];
  const head = hasKey()
    ? ["import os", "", "from openai import OpenAI", "", `client = OpenAI(base_url=${quote(address("v1"))}, api_key=os.environ["MOORAGE_API_KEY"])`]
    : ["from openai import OpenAI", "", `client = OpenAI(base_url=${quote(address("v1"))}, api_key="none")`];
  const { stream, ...rest } = body;
  const given = Object.entries(rest).map(([name, value]) => `    ${name}=${literal(value, 1)},`);
  if (!stream) return [...head, `answer = ${call}(`, ...given, ")", "print(answer.data[0].embedding[:5])", ""].join("\n");
  return [...head, `stream = ${call}(`, ...given, "    stream=True,", ")", "for chunk in stream:", "    if chunk.choices:", `        ${print}`, "print()", ""].join("\n");
}

// A JSON text is a Python string literal too, once lone surrogates are out of the question.
const quote = (text) => JSON.stringify(text);

function literal(value, depth) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  const pad = "    ".repeat(depth + 1);
  const end = "    ".repeat(depth);
  if (Array.isArray(value)) return `[\n${value.map((item) => `${pad}${literal(item, depth + 1)},\n`).join("")}${end}]`;
  return `{${Object.entries(value).map(([name, item]) => `${quote(name)}: ${literal(item, depth + 1)}`).join(", ")}}`;
}

// Two buttons that show a request in a dialog. request: () => [path, body]
export function codeButtons(request) {
  return [["curl", curl], ["Python", python]].map(([title, write]) =>
    make("button", { type: "button", class: "plain", onclick: () => open(`As ${title}`, write(...request())) }, title));
}

function open(title, text) {
  say(byId("code-title"), title);
  byId("code-text").value = text;
  say(byId("code-said"), "");
  byId("code").showModal();
  byId("code-copy").focus();
}

byId("code-close").addEventListener("click", () => byId("code").close());
byId("code-copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(byId("code-text").value);
    say(byId("code-said"), "Copied.");
  } catch { // only pages from this machine or with TLS may write there
    byId("code-text").select();
    say(byId("code-said"), "Selected: copy it with Ctrl+C or ⌘C.");
  }
});
