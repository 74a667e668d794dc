// The modules of one device as a treemap and as a list, and why the chosen one is there.
import { drawOnChange, make, say } from "./dom.js";
import { bytes, exactBytes, whole } from "./numbers.js";

const COLOURS = 6; // --tree-1 to --tree-6 in placement.css
const HEIGHT_PX = 260;

export function drawModules(node, device) {
  drawOnChange(node, [device.modules, device.reason], () => build(node, device));
}

function build(node, device) {
  const map = make("div", { class: "treemap", role: "img", "aria-label": `Weights of the modules on ${device.id} by size; the list below has the same` });
  const why = make("p", { class: "why", role: "status" });
  const buttons = device.modules.map((group, index) =>
    make("button", { type: "button", "aria-pressed": "false", onclick: () => choose(group, null) },
      make("span", { class: "swatch", "data-tree": (index % COLOURS) + 1 }),
      make("span", { class: "name" }, group.name),
      make("span", { class: "number", title: exactBytes(group.bytes) }, bytes(group.bytes))));
  const choose = (group, place) => {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(device.modules[index] === group)));
    say(why, reason(group, place, device.reason));
  };
  node.replaceChildren(map, why, make("ul", { class: "groups" }, buttons.map((button) => make("li", {}, button))));
  const largest = device.modules.reduce((a, b) => (b.bytes > a.bytes ? b : a));
  choose(largest, null);
  chart(map, device, choose);
}

// The same words as `moorage plan --explain`.
function reason(group, place, why) {
  const units = place === null ? group.each : [group.each[place]];
  const weights = units.reduce((sum, unit) => sum + unit.weights, 0);
  const kv = units.reduce((sum, unit) => sum + unit.kv, 0);
  const name = place === null ? group.name : nameOf(group, place);
  const many = units.length > 1;
  const head = many ? `${name}: ${whole(units.length)} modules with ${bytes(weights)} of weights` : `${name} has ${bytes(weights)} of weights`;
  const size = weights || kv ? `${head} and ${bytes(kv)} of KV cache` : `${name} has no bytes of its own: it shares a tensor`;
  if (!why) return `${size}.`;
  return `${size}; ${many ? `of each is true: ${why}` : why}.`;
}

// "model.layers.0-29", 3 -> "model.layers.3"
function nameOf(group, place) {
  if (group.count === 1) return group.name;
  const [, head, first] = group.name.match(/^(.*\.)(\d+)-\d+$/);
  return `${head}${Number(first) + place}`;
}

async function chart(node, device, choose) {
  const { init } = await import("./treemap.js");
  if (!node.isConnected) return; // closed or drawn again meanwhile
  node.style.height = `${HEIGHT_PX}px`;
  const drawing = init(node);
  const draw = () => {
    drawing.resize();
    drawing.setOption(options(node, device), true);
  };
  drawing.on("click", ({ data }) => data.group && choose(data.group, data.place));
  const theme = matchMedia("(prefers-color-scheme: dark)");
  theme.addEventListener("change", draw);
  const sizes = new ResizeObserver(() => {
    if (!node.isConnected) {
      sizes.disconnect();
      theme.removeEventListener("change", draw);
      drawing.dispose();
    } else if (node.clientWidth) draw();
  });
  sizes.observe(node);
}

function options(node, device) {
  const style = getComputedStyle(node);
  const colour = (name) => style.getPropertyValue(name).trim();
  const data = device.modules.map((group, index) => {
    const itemStyle = { color: colour(`--tree-${(index % COLOURS) + 1}`) };
    const inside = (unit, place) => ({ name: nameOf(group, place).split(".").at(-1), value: unit.weights, group, place, itemStyle });
    const children = group.count === 1 ? null : group.each.map(inside);
    const name = group.name.replace(/^model\./, "");
    return { name: `${name}${children ? "  " : "\n"}${bytes(group.bytes)}`, value: group.bytes, group, place: null, itemStyle, children };
  });
  data.sort((a, b) => b.value - a.value);
  const label = { color: colour("--tree-text"), fontFamily: style.fontFamily, fontSize: 12, lineHeight: 16 };
  const border = { borderColor: colour("--panel"), borderWidth: 1, gapWidth: 1 };
  return {
    animation: false,
    series: [{
      type: "treemap",
      data,
      label,
      upperLabel: { ...label, color: colour("--text"), show: true, height: 22 },
      sort: false,
      left: 0,
      right: 0,
      top: 0,
      bottom: 0,
      roam: false,
      nodeClick: false,
      breadcrumb: { show: false },
      itemStyle: border,
      levels: [{ upperLabel: { show: false }, itemStyle: { gapWidth: 3 } }, { itemStyle: border }],
      emphasis: { itemStyle: { borderColor: colour("--text") } },
    }],
  };
}
