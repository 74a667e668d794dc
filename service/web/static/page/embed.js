// Embeddings: how alike two texts are to this model.
import { byId, make, say } from "./dom.js";
import { codeButtons } from "./code.js";
import { seconds, whole } from "./numbers.js";
import { post, problem } from "./server.js";

const PATH = "v1/embeddings";

// Returns a function that is told whether the model answers. model: an entry of /v1/models.
export function embeddings(model) {
  const texts = ["The sea is calm today.", "There is no wind on the water."].map((text, index) =>
    make("textarea", { id: `text-${index}`, rows: 3, required: true }, text));
  const button = make("button", {}, "Compare");
  const result = make("div", { class: "alike", role: "status" });
  const body = () => ({ model: model.id, input: texts.map((text) => text.value) });
  const form = make("form", { class: "embed" },
    make("p", { class: "muted" }, "This model does not chat: it turns a text into numbers, close to each other where texts mean the like."),
    texts.map((text, index) => make("div", { class: "field wide" }, make("label", { for: text.id }, index ? "and this one" : "This text"), text)),
    button, result);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    try {
      await compare(body(), result);
    } catch (error) {
      result.replaceChildren(make("p", { class: "notice bad" }, error.message));
    } finally {
      button.disabled = false;
    }
  });
  byId("try-body").append(form);
  byId("try-buttons").append(...codeButtons(() => [PATH, body()]));
  return (answers) => { button.disabled = !answers; };
}

async function compare(body, result) {
  const began = performance.now();
  const reply = await post(PATH, body);
  if (!reply.ok) throw new Error(await problem(reply));
  const { data, usage } = await reply.json();
  const took = (performance.now() - began) / 1000;
  const [a, b] = data.map((entry) => entry.embedding);
  const alike = dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
  const meter = make("meter", { min: 0, max: 1, "aria-label": "Cosine similarity" });
  meter.value = Math.max(0, alike);
  const numbers = a.slice(0, 6).map((number) => number.toFixed(4)).join(", ");
  result.replaceChildren(
    make("p", {}, make("strong", {}, alike.toFixed(4)), " cosine similarity (1: the same direction)"), meter,
    make("p", { class: "muted" }, `${whole(a.length)} numbers each; the first begins ${numbers}, …`));
  say(byId("try-said"), `${whole(usage.prompt_tokens)} tokens · ${seconds(took)} · request ${reply.headers.get("x-request-id")}`);
}

const dot = (a, b) => a.reduce((sum, number, index) => sum + number * b[index], 0);
