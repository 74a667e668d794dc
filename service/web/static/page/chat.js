// The chat: deep-chat shows it, this module asks the server and keeps the conversation.
import { byId, make, say } from "./dom.js";
import { codeButtons } from "./code.js";
import { look } from "./chat-look.js";
import { rate, seconds, whole } from "./numbers.js";
import { events, post, problem } from "./server.js";
import { settings } from "./settings.js";

// Returns a function that is told whether the model answers. model: an entry of /v1/models.
export async function chat(model) {
  const chats = model.capabilities.chat;
  const path = chats ? "v1/chat/completions" : "v1/completions";
  const options = settings(chats);
  let turns = []; // { role, content } of the conversation so far, without the system prompt
  let last = null; // the newest request, to be copied
  let stop = null; // ends the newest answer
  let ended = null; // settled when it has

  const request = (more) => {
    const system = options.system();
    const said = [...(system ? [{ role: "system", content: system }] : []), ...turns, ...more];
    const asked = chats ? { messages: said } : { prompt: more.at(-1)?.content ?? "" };
    return { model: model.id, ...asked, ...options.fields(), stream: true };
  };

  const converse = async ({ messages }, signals) => {
    const question = { role: "user", content: messages.at(-1).text };
    last = request([question]);
    say(byId("try-said"), "");
    stop = new AbortController();
    signals.stopClicked.listener = () => stop.abort();
    const show = (text) => signals.onResponse({ text });
    try {
      const text = await answer(path, last, stop.signal, signals.onOpen, show);
      turns.push(question, { role: "assistant", content: text });
      signals.onClose();
    } catch (error) {
      signals.onClose();
      box.addMessage({ error: error.message });
    }
  };

  const handler = (body, signals) => {
    ended = converse(body, signals);
  };

  await import("./deep-chat.js");
  const box = document.createElement("deep-chat");
  look(box, chats ? "Ask something" : "Begin a text, and the model goes on");
  box.connect = { stream: true, handler };
  const clear = make("button", { type: "button", class: "plain", onclick: async () => {
    stop?.abort();
    await ended;
    turns = [];
    last = null;
    box.clearMessages();
    say(byId("try-said"), "");
  } }, "Clear");
  byId("try-body").append(box);
  byId("try-settings").append(options.panel);
  const example = () => [path, last ?? request([{ role: "user", content: "What is the capital of France?" }])];
  byId("try-buttons").append(options.button, ...codeButtons(example), clear);
  if (!chats) byId("try-body").prepend(make("p", { class: "muted" }, "This model has no chat template: it goes on with your text, and knows nothing of what was said before."));
  let answered = true;
  return (answers) => {
    if (answers === answered) return;
    answered = answers;
    box.classList.toggle("waiting", !answers);
    box.disableSubmitButton(!answers);
  };
}

// Ask, show the pieces as they come, tell the numbers, and return the text. A stop is no error.
async function answer(path, body, signal, opened, show) {
  const began = performance.now();
  let first = 0;
  let text = "";
  let usage = null;
  let reason = "stopped by you";
  let thinking = false;
  let id = "";
  try {
    const wanted = { ...body, stream_options: { include_usage: true, continuous_usage_stats: true } };
    const reply = await post(path, wanted, signal);
    id = reply.headers.get("x-request-id");
    if (!reply.ok) throw new Error(await problem(reply));
    opened();
    for await (const event of events(reply)) {
      usage = event.usage ?? usage;
      const [choice] = event.choices;
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      const thought = choice.delta?.reasoning_content;
      const piece = choice.delta ? choice.delta.content : choice.text;
      if (thought || piece) first ||= performance.now();
      if (thought) await show((thinking ? "" : "> ") + thought.replaceAll("\n", "\n> "));
      if (piece) await show((thinking ? "\n\n" : "") + piece);
      thinking = Boolean(thought) || (thinking && !piece);
      text += piece ?? "";
      tell(usage, began, first, id);
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
  if (text === "") await show(" "); // an answer without a word ends the dots too
  tell(usage, began, first, id, reason);
  return text;
}

const REASONS = { stop: "", length: "cut off by max tokens or the context", tool_calls: "" };

function tell(usage, began, first, id, reason) {
  const said = byId("try-said");
  if (!usage) {
    say(said, reason ? `${reason} · request ${id}` : "");
    return;
  }
  const took = (performance.now() - first) / 1000;
  const { prompt_tokens: asked, completion_tokens: made } = usage;
  const pace = first && made > 1 && took > 0.05 ? `${rate((made - 1) / took)} tokens/s` : "";
  const parts = [
    `prompt ${whole(asked)} tokens`,
    `answer ${whole(made)} tokens`,
    pace,
    first ? `first after ${seconds((first - began) / 1000)}` : "",
    reason === undefined ? "" : (REASONS[reason] ?? reason),
  ];
  const request = make("span", { class: "request" }, "request ", make("code", {}, id));
  said.replaceChildren(parts.filter(Boolean).join(" · "), " ", request);
}
