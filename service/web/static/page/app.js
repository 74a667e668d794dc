// Ask /placement again and again, and hand what it says to the parts of the page.
import { byId, drawOnChange, say } from "./dom.js";
import { percent, short } from "./numbers.js";
import { drawDevices } from "./devices.js";
import { drawPace, follow } from "./pace.js";
import { drawAttempts, drawError, drawProof, drawWarnings, drawWatch } from "./proof.js";
import { ask, hasKey, problem, setKey } from "./server.js";
import { offer } from "./try.js";

const EVERY_MS = 1000;
const HIDDEN_MS = 15000;
const AFTER_FAILURE_MS = 2000;
const SAID = {
  planned: "Planned",
  loading: "Loading",
  validating: "Proving",
  ready: "Ready",
  idle: "Idle: the next request loads it",
  degraded: "Degraded: the model changed",
  draining: "Stopping",
  failed: "Failed",
};
const LOADING = ["planned", "loading", "validating"];

let timer = 0;
let lostSince = 0;

async function look() {
  clearTimeout(timer);
  let next = EVERY_MS;
  try {
    const answer = await ask("placement");
    if (answer.status === 401) {
      await askForKey(answer);
      return;
    }
    if (!answer.ok) throw new Error(await problem(answer));
    show(await answer.json());
    lostSince = 0;
    byId("lost").hidden = true;
    byId("key").hidden = true;
    byId("forget").hidden = !hasKey();
  } catch (error) {
    lost(error);
    next = AFTER_FAILURE_MS;
  }
  timer = setTimeout(look, document.hidden ? HIDDEN_MS : next);
}

function show(placement) {
  const { state, model, strategy } = placement;
  byId("placement").setAttribute("aria-busy", "false");
  document.title = state === "ready" ? `${model.id} · Moorage` : `${SAID[state]} · Moorage`;
  say(byId("model"), model.id);
  const pill = byId("state");
  pill.dataset.state = state;
  say(pill, SAID[state]);
  const facts = [
    placement.deployment && `deployment ${placement.deployment}`,
    model.parameters && `${short(model.parameters)} parameters`,
    model.dtype,
    model.quantize !== "none" && model.quantize,
    model.max_context && `context ${model.max_context.toLocaleString("en-US")} tokens`,
    `strategy ${strategy.name}`,
  ];
  say(byId("facts"), facts.filter(Boolean).join(" · "));
  drawLoading(placement);
  drawOnChange(byId("error"), placement.error ?? null, drawError);
  drawDevices(byId("devices"), placement);
  follow(placement.activity, placement.kv, performance.now());
  drawPace(byId("pace"));
  drawOnChange(byId("proof"), [placement.certificate, state], drawProof);
  drawWatch(byId("watch"), placement.watch);
  byId("attempts-section").hidden = placement.attempts.length === 0;
  drawOnChange(byId("attempts"), placement.attempts, drawAttempts);
  byId("warnings-section").hidden = placement.warnings.length === 0;
  drawOnChange(byId("warnings"), placement.warnings, drawWarnings);
  offer(placement);
}

function drawLoading({ state, progress, devices }) {
  const loading = LOADING.includes(state);
  byId("loading").hidden = !loading;
  if (!loading) return;
  say(byId("loading-title"), SAID[state]);
  byId("progress").value = progress;
  const weights = devices.reduce((sum, device) => sum + (device.planned?.weights ?? 0), 0);
  const what = {
    planned: "Looking for the model's files and planning where it goes.",
    loading: `${percent(progress)} of the load is done.`,
    validating: "The weights are in memory; every tensor is being accounted for.",
  }[state];
  say(byId("progress-said"), weights || state === "planned" ? what : "Planning where the model goes.");
}

function lost(error) {
  lostSince ||= Date.now();
  const node = byId("lost");
  node.hidden = false;
  const since = new Date(lostSince).toLocaleTimeString();
  say(node, `The server has not answered since ${since} (${error.message}). What is below is from before.`);
  const pill = byId("state");
  pill.dataset.state = "lost";
  say(pill, "No answer");
}

async function askForKey(answer) {
  const form = byId("key");
  say(byId("key-said"), hasKey() ? await problem(answer) : "");
  setKey("");
  byId("forget").hidden = true;
  if (form.hidden) {
    form.hidden = false;
    form.elements.key.focus();
  }
  byId("state").dataset.state = "locked";
  say(byId("state"), "Locked");
  offer(null);
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  const input = event.target.elements.key;
  setKey(input.value.trim());
  input.value = "";
  look();
});
byId("forget").addEventListener("click", () => {
  setKey("");
  location.reload(); // and with it everything that the key has shown
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && byId("key").hidden) look();
});
look();
