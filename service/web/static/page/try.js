// What there is to try depends on the model: a chat, a text to go on with, or embeddings.
import { byId, say } from "./dom.js";
import { chat } from "./chat.js";
import { embeddings } from "./embed.js";
import { percent } from "./numbers.js";
import { ask } from "./server.js";

// what is offered now: a function that is told whether the model answers; and for which model
let offered = null;
let offeredTo = "";
let asking = false;

// placement: what /placement said last; null while a key is missing.
export function offer(placement) {
  const answers = placement !== null && (placement.state === "ready" || placement.state === "idle");
  const note = byId("try-note");
  say(note, placement === null ? "Waiting for the key." : answers ? "" : why(placement));
  note.hidden = note.textContent === "";
  offered?.(answers);
  if (answers && !asking && offeredTo !== placement.model.id) begin(placement.model.id);
}

function why({ state, progress }) {
  if (state === "loading") return `Loading, ${percent(progress)}. You can ask as soon as every tensor is accounted for.`;
  if (state === "validating") return "The placement is being proven. You can ask in a moment.";
  if (state === "planned") return "Nothing is loaded yet. You can ask as soon as the model is there and proven.";
  if (state === "degraded") return "The model is not what was proven any more, so it answers nothing.";
  if (state === "draining") return "The server is stopping and takes nothing new.";
  return "The model does not answer: see the error above.";
}

async function begin(id) {
  asking = true;
  try {
    const answer = await ask("v1/models");
    if (!answer.ok) return; // it left again: the next look tries anew
    const model = (await answer.json()).data[0];
    const offers = model.capabilities.embeddings ? embeddings : chat;
    for (const part of ["try-buttons", "try-settings", "try-body"]) byId(part).replaceChildren();
    say(byId("try-said"), "");
    say(byId("try-title"), model.capabilities.chat ? "Chat" : model.capabilities.embeddings ? "Embeddings" : "Text");
    offered = await offers(model);
    offeredTo = id;
    offered(true);
  } catch (error) {
    console.warn("the model could not be offered yet:", error.message);
  } finally {
    asking = false;
  }
}
