// Requests to this server. The key is in this module's memory and nowhere else.

let key = "";

export const setKey = (text) => { key = text; };
export const hasKey = () => key !== "";

// Addresses are relative, so that the page works behind a proxy that adds a path.
export function ask(path, options = {}) {
  const headers = { ...(key ? { Authorization: `Bearer ${key}` } : {}), ...options.headers };
  return fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
}

export function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

// What went wrong, with its way out if the server knows one.
export async function problem(answer) {
  try {
    const { error } = await answer.json();
    return [error.message, error.hint].filter(Boolean).map(sentence).join(" ");
  } catch {
    return `The server answered with status ${answer.status}.`;
  }
}

// The JSON of every event of a stream, until [DONE]. Throws an Error for an event with one, and for
// a stream that just stops.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment: the server is still at it
      if (part === "data: [DONE]") return;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
