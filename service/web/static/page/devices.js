// One card for each device: planned and measured bytes as stacked bars and as a table.
import { make, say } from "./dom.js";
import { bytes, exactBytes, whole } from "./numbers.js";
import { drawModules } from "./modules.js";

// parts of a bar, in order: key, name, what it means
const PARTS = [
  ["others", "Others", "in use by other programs before the load"],
  ["weights", "Weights", "parameters and buffers"],
  ["used", "KV in use", "keys and values that requests hold now"],
  ["kv", "KV reserved", "keys and values, reserved for requests to come"],
  ["overhead", "Overhead", "planned: what one step computes with; measured: the rest of what the allocator holds"],
  ["free", "Free", "left on the device"],
];

const cards = new Map(); // by device id

export function drawDevices(node, placement) {
  const { devices } = placement;
  if (devices.length === 0) {
    cards.clear();
    node.replaceChildren(make("p", { class: "muted" }, "Not planned yet."));
    return;
  }
  if (devices.map((device) => device.id).join() !== [...cards.keys()].join()) {
    cards.clear();
    node.replaceChildren(...devices.map((device) => newCard(device.id)));
  }
  for (const device of devices) {
    update(cards.get(device.id), device, planned(device, placement), measured(device, placement));
  }
}

// Bytes of every part as planned; null if nothing was.
export function planned(device, { kv }) {
  const plan = device.planned;
  if (!plan) return null;
  const share = kv.planned_tokens ? Math.min(1, kv.used_tokens / kv.planned_tokens) : 0;
  const used = Math.round(plan.kv * share);
  return rest(device, { weights: plan.weights, used, kv: plan.kv - used, overhead: plan.overhead });
}

// The same as it was found; null before it was. overhead is null where no allocator tells it.
export function measured(device, { certificate, engine, kv }) {
  const weights = certificate?.devices?.[device.id];
  if (weights == null) return null;
  const held = engine.kv_reserved?.[device.id] ?? 0;
  const share = kv.planned_tokens ? Math.min(1, kv.used_tokens / kv.planned_tokens) : 0;
  const used = Math.round(held * share);
  const reserved = device.measured?.reserved;
  const overhead = reserved == null ? null : Math.max(0, reserved - weights - held);
  return rest(device, { weights, used, kv: held - used, overhead });
}

function rest(device, parts) {
  const taken = parts.weights + parts.used + parts.kv + (parts.overhead ?? 0);
  const others = device.total == null ? null : Math.max(0, device.total - device.free_before);
  return { others, ...parts, free: device.free_before - taken };
}

function newCard(id) {
  const name = make("span", { class: "muted" });
  const left = make("span", { class: "left" });
  const bars = {};
  const lines = ["planned", "measured"].map((which) => {
    bars[which] = make("div", { class: "bar", role: "img" }, ...PARTS.map(([key]) => make("span", { class: `part ${key}` })));
    return make("div", { class: "line" }, make("span", {}, which), bars[which]);
  });
  const body = make("tbody");
  const head = ["", "planned", "measured"].map((text) => make("th", { scope: "col" }, text || make("span", { class: "hidden" }, "part")));
  const modules = make("div", { class: "modules", id: `modules-${id.replace(/\W/g, "-")}`, hidden: true });
  const toggle = make("button", { type: "button", class: "toggle", "aria-expanded": "false", "aria-controls": modules.id }, `Modules on ${id}`);
  const card = { node: null, name, left, bars, body, modules, toggle, device: null };
  const flip = () => {
    modules.hidden = !modules.hidden;
    toggle.setAttribute("aria-expanded", String(!modules.hidden));
    if (!modules.hidden) drawModules(modules, card.device);
  };
  toggle.addEventListener("click", flip);
  const pressable = make("div", { class: "lines", onclick: flip }, lines);
  card.node = make("article", { class: "device", "aria-label": `Device ${id}` },
    make("div", { class: "row" }, make("h3", {}, id, " ", name), left),
    pressable,
    make("table", { class: "parts" }, make("thead", {}, make("tr", {}, head)), body),
    toggle, modules);
  cards.set(id, card);
  return card.node;
}

function update(card, device, plan, found) {
  card.device = device;
  say(card.name, device.name === device.id ? "" : device.name);
  const most = plan ?? found;
  say(card.left, most ? `${bytes(most.free)} left of ${bytes(device.total ?? device.free_before)}` : "");
  fillBar(card.bars.planned, device, plan, "planned");
  fillBar(card.bars.measured, device, found, "measured");
  const rows = PARTS.filter(([key]) => plan?.[key] != null || found?.[key] != null);
  if (card.body.children.length !== rows.length) {
    card.body.replaceChildren(...rows.map(([key, name, said]) =>
      make("tr", { title: said }, make("th", { scope: "row" }, make("span", { class: `swatch ${key}` }), name), make("td", { class: "number" }), make("td", { class: "number" }))));
  }
  rows.forEach(([key], index) => {
    const [, first, second] = card.body.children[index].children;
    for (const [cell, parts] of [[first, plan], [second, found]]) {
      say(cell, bytes(parts?.[key]));
      cell.title = exactBytes(parts?.[key]);
    }
  });
  if (!card.modules.hidden) drawModules(card.modules, device);
  card.toggle.hidden = device.modules.length === 0;
  say(card.toggle, `${whole(device.modules.reduce((sum, group) => sum + group.count, 0))} modules on ${device.id}, and why they are there`);
}

function fillBar(bar, device, parts, which) {
  bar.classList.toggle("empty", !parts);
  const scale = device.total ?? device.free_before;
  for (const [key] of PARTS) {
    const size = Math.max(0, parts?.[key] ?? 0);
    const part = bar.querySelector(`.${key}`);
    part.hidden = size === 0;
    part.style.flexGrow = size / scale;
  }
  const said = PARTS.filter(([key]) => parts?.[key]).map(([key, name]) => `${name} ${bytes(parts[key])}`);
  bar.setAttribute("aria-label", said.length ? `${which}: ${said.join(", ")}` : `${which}: not yet`);
}
