// The certificate with its checks, the watch, what was tried before, warnings and the error.
import { drawOnChange, make, put, say } from "./dom.js";
import { ago, clock, seconds, whole } from "./numbers.js";
import { CHECKS } from "./checks.js";

export function drawError(node, error) {
  node.replaceChildren();
  if (!error) return;
  const hint = error.hint ? make("p", {}, `What to do: ${error.hint}`) : null;
  node.append(make("div", { class: "notice bad" }, make("p", {}, `${error.message}${classOf(error)}`), hint));
}

// Redrawn when it changes only, so an opened list stays open between two looks.
export function drawProof(node, [certificate, state]) {
  const open = node.querySelector("details")?.open;
  node.replaceChildren();
  if (!certificate) {
    const said = state === "failed" ? "There is none: the model was not proven." : "Not proven yet. No request reaches the model before it is.";
    node.append(make("p", { class: "verdict waiting" }, said));
    return;
  }
  const failed = certificate.checks.filter((check) => check.status !== "pass");
  const good = certificate.valid;
  put(
    node,
    make("p", { class: `verdict ${good ? "good" : "bad"}` }, good ? "Proven" : "Not valid"),
    certificate.revoked ? make("p", { class: "notice bad" }, `Revoked: ${certificate.revoked}`) : null,
    make("p", {}, `${certificate.checks.length - failed.length} of ${certificate.checks.length} checks passed in ${seconds(certificate.seconds)}, after a load of ${seconds(certificate.load_seconds)}.`),
    make("dl", {}, ...facts(certificate)),
    make("details", { open: open || failed.length > 0 }, make("summary", {}, "Every check"), table(certificate.checks)),
  );
}

function facts(certificate) {
  const { versions } = certificate;
  return [
    ["issued", clock(certificate.issued_at)],
    ["unchanged until", clock(certificate.unchanged_until)],
    ["compared with files", `${whole(certificate.tensors_sampled)} tensors`],
    ["made with", Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(", ")],
    ["plan", make("code", { title: certificate.plan_hash }, certificate.plan_hash.slice(0, 16))],
  ].map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
}

function table(checks) {
  const rows = checks.map((check) => {
    const passed = check.status === "pass";
    return make("tr", { class: passed ? "" : "failed" },
      make("td", {}, make("span", { class: passed ? "mark good" : "mark bad" }, passed ? "passed" : "failed")),
      make("td", {}, make("code", {}, check.class)),
      make("td", {}, CHECKS[check.class] ?? "", check.message ? make("p", { class: "bad" }, check.message) : null),
      make("td", { class: "number" }, whole(check.checked)),
      make("td", { class: "number" }, `${check.ms} ms`));
  });
  const head = ["", "class", "what it says", "looked at", "took"].map((text) => make("th", { scope: "col" }, text || make("span", { class: "hidden" }, "outcome")));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Checks" },
    make("table", { class: "checks" }, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows)));
}

export function drawWatch(node, watch) {
  if (!node.firstChild) node.append(make("h3", {}, "The watch"), make("p"), make("ul", { class: "findings" }));
  const [, said, list] = node.children;
  if (!watch.enabled) say(said, "Off, or not begun: nothing looks for changes now.");
  else if (watch.checked_at === null) say(said, `Looks for changes every ${watch.interval_s} s; it has not looked yet.`);
  else {
    const found = watch.changed ? `${whole(watch.changed)} changed` : "nothing changed";
    say(said, `Looks for changes every ${watch.interval_s} s. ${whole(watch.checks)} looks, the last ${ago(watch.checked_at)}: ${found}.`);
  }
  drawOnChange(list, watch.findings, drawFindings);
}

function drawFindings(node, findings) {
  node.replaceChildren(...findings.map((finding) => make("li", {}, make("code", {}, finding.name ?? ""), ` was ${finding.was}, is ${finding.now}`)));
}

export function drawAttempts(node, attempts) {
  node.replaceChildren(...attempts.map((attempt) => {
    const quantize = attempt.quantize === "none" ? "" : `, ${attempt.quantize}`;
    const hint = attempt.error.hint ? make("p", { class: "muted" }, `What to do: ${attempt.error.hint}`) : null;
    return make("li", {},
      make("p", {}, make("strong", {}, `${attempt.strategy}${quantize}`), ` was refused at ${STAGES[attempt.stage] ?? attempt.stage} after ${seconds(attempt.seconds)}`),
      make("p", { class: "bad" }, `${attempt.error.message}${classOf(attempt.error)}`), hint);
  }));
}

const STAGES = {
  import: "its import",
  select: "its selection",
  options: "its options",
  plan: "the plan",
  load: "the load",
  certificate: "the certificate",
  validate: "its own check",
  place_inputs: "placing inputs",
  start: "the first token",
};

// The failure class, unless the message names it already.
function classOf(error) {
  const name = error.failure_class;
  return name && !error.message.includes(`(${name})`) ? ` (${name})` : "";
}

export function drawWarnings(node, warnings) {
  node.replaceChildren(...warnings.map((warning) => make("li", {}, String(warning))));
}
