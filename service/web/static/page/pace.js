// What the engine does: numbers of now, and the last two minutes as lines.
import { make, say } from "./dom.js";
import { percent, rate, whole } from "./numbers.js";

const KEPT_MS = 120000;
const WIDTH = 240;
const HEIGHT = 40;
const SVG = "http://www.w3.org/2000/svg";

let samples = []; // of { at, generated, requests, kv }: milliseconds, tokens per second, counts
let before = null;
let now = null;

// Take in the counts of one answer. at: milliseconds of a clock that never goes back.
export function follow(activity, kv, at) {
  now = activity && { ...activity, kv: kv.used_tokens ?? 0, planned: kv.planned_tokens, generated: 0 };
  if (!now) {
    before = null;
    return;
  }
  // counts begin again with a fresh engine
  if (before && activity.generated_tokens >= before.tokens && at > before.at) {
    now.generated = ((activity.generated_tokens - before.tokens) / (at - before.at)) * 1000;
  }
  before = { tokens: activity.generated_tokens, at };
  const requests = now.running + now.waiting;
  samples.push({ at, generated: now.generated, requests, kv: now.kv });
  samples = samples.filter((sample) => sample.at > at - KEPT_MS);
}

export function drawPace(node) {
  if (!node.firstChild) {
    node.append(tile("generated", "generated", "tokens/s"), tile("requests", "requests", ""), tile("kv", "KV cache", ""));
  }
  const { generated = 0, running = 0, waiting = 0, kv = 0, planned = 0 } = now ?? {};
  set(node, "generated", rate(generated), `${whole(before?.tokens ?? 0)} tokens since the start`);
  set(node, "requests", `${running} running`, `${waiting} waiting in the queue`);
  const share = planned ? ` of ${whole(planned)} (${percent(kv / planned)})` : "";
  set(node, "kv", `${whole(kv)} tokens`, planned ? `held${share}` : "this model keeps no planned KV cache");
}

function tile(name, title, unit) {
  const line = document.createElementNS(SVG, "svg");
  line.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  line.setAttribute("preserveAspectRatio", "none");
  line.setAttribute("role", "img");
  line.append(document.createElementNS(SVG, "path"), document.createElementNS(SVG, "path"));
  const value = make("p", { class: "value" }, make("strong"), unit && ` ${unit}`);
  return make("div", { class: "tile", "data-of": name, "data-title": title }, make("h3", {}, title), value, line, make("p", { class: "muted" }));
}

function set(node, name, value, said) {
  const box = node.querySelector(`[data-of=${name}]`);
  say(box.querySelector("strong"), value);
  say(box.lastChild, said);
  const [area, stroke] = box.querySelectorAll("path");
  const points = samples.map((sample) => [sample.at, sample[name]]);
  const most = Math.max(1, ...points.map((point) => point[1]));
  const end = samples.at(-1)?.at ?? 0;
  const path = points
    .map(([at, y]) => `${(WIDTH * (1 - (end - at) / KEPT_MS)).toFixed(1)},${(HEIGHT - 2 - (y / most) * (HEIGHT - 4)).toFixed(1)}`)
    .join("L");
  stroke.setAttribute("d", path && `M${path}`);
  const first = path.split(",")[0];
  area.setAttribute("d", path && `M${first},${HEIGHT}L${path}L${WIDTH},${HEIGHT}Z`);
  const line = box.querySelector("svg");
  line.setAttribute("aria-label", `${box.dataset.title} over the last two minutes, at most ${whole(most)}`);
}
