// The fields of a request that people like to turn. An empty one is not sent.
import { make } from "./dom.js";

const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }, "0 always takes the likeliest token"],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01 }, "of the likeliest tokens whose shares add up to this"],
  ["max_tokens", "Max tokens", { min: 1, step: 1 }, "of one answer"],
  ["seed", "Seed", { step: 1 }, "the same seed draws the same tokens"],
];

// Returns { button, panel, fields(), system() }. chat: whether there is a system prompt.
export function settings(chat) {
  const system = make("textarea", { id: "system", rows: 3, placeholder: "None: the model's template decides" });
  const inputs = FIELDS.map(([name, , limits, said]) =>
    make("input", { id: `set-${name}`, type: "number", inputmode: "decimal", placeholder: "default", title: said, ...limits }));
  const panel = make("form", { class: "settings", id: "settings", "aria-label": "Settings", hidden: true },
    chat ? make("div", { class: "field wide" }, make("label", { for: "system" }, "System prompt"), system) : null,
    FIELDS.map(([name, title, , said], index) =>
      make("div", { class: "field" }, make("label", { for: `set-${name}`, title: said }, title), inputs[index])));
  panel.addEventListener("submit", (event) => event.preventDefault());
  const button = make("button", { type: "button", class: "plain", "aria-expanded": "false", "aria-controls": "settings" }, "Settings");
  button.addEventListener("click", () => {
    panel.hidden = !panel.hidden;
    button.setAttribute("aria-expanded", String(!panel.hidden));
  });
  const fields = () => Object.fromEntries(FIELDS
    .map(([name], index) => [name, inputs[index]])
    .filter(([, input]) => input.value !== "" && input.validity.valid)
    .map(([name, input]) => [name, Number(input.value)]));
  return { button, panel, fields, system: () => system.value.trim() };
}
