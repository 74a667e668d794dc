// Elements without HTML text: what a server or a model says is always text.

// make("p", { class: "muted", onclick: f }, "text", node): names with "on" are listeners,
// true and false set and leave out an attribute.
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  put(node, ...children);
  return node;
}

// node.append without null and undefined, which it would write as words.
export function put(node, ...children) {
  node.append(...children.flat().filter((child) => child != null));
}

export const byId = (id) => document.getElementById(id);

// Set the text only if it differs: a screen reader says a status again whenever it is set.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// draw(node, data) only when the data differs from what was drawn there last: what is focused,
// selected or opened stays.
const drawn = new WeakMap();
export function drawOnChange(node, data, draw) {
  const text = JSON.stringify(data) ?? "";
  if (drawn.get(node) === text) return;
  drawn.set(node, text);
  draw(node, data);
}
