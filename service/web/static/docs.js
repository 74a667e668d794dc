// Fetch the document, with a key if the server wants one, and show it. The key stays in this page.
"use strict";

const form = document.getElementById("key");

async function show(key) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch("openapi.json", { headers });
  if (answer.status === 401) {
    form.hidden = false;
    form.querySelector("p").textContent = key ? (await answer.json()).error.message : "";
    return;
  }
  form.hidden = true;
  const spec = await answer.json();
  const ui = SwaggerUIBundle({
    spec,
    dom_id: "#docs",
    deepLinking: true,
    validatorUrl: null, // or the document is sent to another host
    onComplete: () => key && ui.preauthorizeApiKey("key", key),
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  show(form.elements.key.value.trim());
});
show("");
