// How deep-chat looks and what a screen reader hears of it. Colours are the page's own variables,
// which reach into its shadow, so light and dark follow by themselves.

const STYLE = `
  #container { background: transparent; }
  #chat-view { grid-template-rows: minmax(0, 1fr) auto; }
  #messages { padding: 0.25rem 0.25rem 1rem; }
  .message-bubble { max-width: 92% !important; overflow-wrap: anywhere; line-height: 1.5; }
  .message-bubble p { margin: 0 0 0.6em; }
  .message-bubble > :first-child { margin-top: 0; }
  .message-bubble > :last-child { margin-bottom: 0; }
  .message-bubble ol, .message-bubble ul { padding-left: 1.5rem; }
  .message-bubble pre { overflow-x: auto; padding: 0.6rem 0.75rem; border-radius: 6px; background: var(--code); color: var(--text); width: auto; margin: 0.5em 0; }
  .message-bubble code { font-family: var(--mono); font-size: 0.9em; }
  .message-bubble blockquote { margin: 0 0 0.6em; padding-left: 0.75rem; border-left: 3px solid var(--line); color: var(--muted); }
  .message-bubble table { border-collapse: collapse; }
  .message-bubble td, .message-bubble th { padding: 0.2rem 0.5rem; border: 1px solid var(--line); }
  .message-bubble a { color: var(--accent); }
  #text-input:focus-visible { outline: none; }
  #text-input-container:focus-within { outline: 2px solid var(--accent); outline-offset: -2px; }
  .inside-end { inset-block-end: 0.45em !important; inset-inline-end: 0.6em !important; }
  [role="button"]:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; border-radius: 6px; }
  [contenteditable]:empty::before { color: var(--muted) !important; }
  #stop-icon { background: var(--accent) !important; }
`;

const bubble = (background, color) => ({ bubble: { backgroundColor: background, color, borderRadius: "10px", padding: "0.6rem 0.85rem" } });
const icon = { svg: { styles: { default: { filter: "none", color: "var(--accent)", width: "1.35em", height: "1.35em" } } } };
const faded = { svg: { styles: { default: { filter: "none", color: "var(--muted)", width: "1.35em", height: "1.35em" } } } };

// Everything is set before the element is in the page: later, it would fetch a font.
export function look(box, placeholder) {
  box.style.fontFamily = "inherit";
  box.chatStyle = {
    fontFamily: "inherit",
    fontSize: "0.95rem",
    width: "100%",
    height: "100%",
    border: "none",
    backgroundColor: "transparent",
    color: "var(--text)",
  };
  box.messageStyles = {
    default: {
      shared: { innerContainer: { fontSize: "inherit" } },
      user: bubble("var(--user)", "var(--text)"),
      ai: bubble("var(--answer)", "var(--text)"),
    },
    error: bubble("var(--bad-back)", "var(--bad)"),
  };
  box.textInput = {
    placeholder: { text: placeholder },
    styles: {
      container: { width: "100%", margin: "0", backgroundColor: "var(--field)", border: "1px solid var(--line)", borderRadius: "10px", boxShadow: "none" },
      text: { padding: "0.7rem 2.75rem 0.7rem 0.85rem", color: "var(--text)", fontSize: "1rem" },
    },
  };
  box.inputAreaStyle = { padding: "0", margin: "0" };
  box.submitButtonStyles = { submit: icon, disabled: faded };
  box.displayLoadingBubble = true;
  box.errorMessages = { displayServiceErrorMessages: true };
  box.auxiliaryStyle = STYLE;
  box.onComponentRender = () => {
    mend(box.shadowRoot);
    watching.observe(box.shadowRoot, { childList: true, subtree: true });
  };
}

// deep-chat makes parts of itself anew when it likes, without names for those who cannot see them,
// and makes links of whatever a model says is one.
const SAFE = ["http:", "https:", "mailto:"];
const watching = new MutationObserver(([change]) => mend(change.target.getRootNode()));

function mend(root) {
  const messages = root.getElementById("messages");
  const input = root.getElementById("text-input");
  const button = root.querySelector(".input-button");
  if (!messages || !input || !button) return; // it is being made
  for (const link of messages.querySelectorAll("a[href]")) {
    if (!SAFE.includes(link.protocol)) link.removeAttribute("href");
  }
  set(messages, { role: "log", "aria-label": "Conversation", tabindex: "0" });
  set(input, { "aria-label": "Message", "aria-multiline": "true" });
  set(button, { "aria-label": root.getElementById("stop-icon") ? "Stop" : "Send" });
}

function set(node, attributes) {
  for (const [key, value] of Object.entries(attributes)) {
    if (node.getAttribute(key) !== value) node.setAttribute(key, value);
  }
}
