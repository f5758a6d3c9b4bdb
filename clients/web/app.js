// The page: views, session picker, API key. Each view is a module of its own.

import * as admin from "./admin.js";
import * as api from "./api.js";
import * as chat from "./chat.js";
import { ask, byId, el, guarded } from "./dom.js";
import * as memory from "./memory.js";
import { tab } from "./tab.js";

const VIEWS = ["chat", "memory", "admin"];

function show() {
  const asked = location.hash.replace("#show-", ""); // no element has this id: the browser would jump to it
  const view = VIEWS.includes(asked) ? asked : "chat";
  document.body.dataset.view = view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  window.scrollTo(0, 0);
  admin.show(view === "admin");
}

/** The list of sessions, with the present one in it even if it does not exist yet. */
async function fillPicker() {
  const found = (await guarded(api.sessions)) ?? [];
  const ids = new Set([...(tab.session ? [tab.session] : []), ...found.map((one) => one.id)]);
  const options = [...ids].map((id) => el("option", { value: id }, id));
  byId("session").replaceChildren(...options, el("option", { value: "" }, "(no memory)"));
  byId("session").value = tab.session;
}

async function fillModels() {
  const found = (await guarded(api.models)) ?? [];
  byId("model").replaceChildren(...found.map((one) => el("option", { value: one.id }, one.id)));
}

/** Look at the chosen session: its version, and the model whose memory it is. */
async function open() {
  await fillPicker();
  if (!tab.session) return;
  const id = tab.session;
  const found = await guarded(() => api.info(id));
  if (id !== tab.session || found === undefined) return;
  const models = [...byId("model").options].map((option) => option.value);
  if (found && models.includes(found.model)) byId("model").value = found.model;
  tab.saw(found ? found.version : 0);
}

async function askForKey(text = "Needed if the server was started with keys.") {
  const key = await ask({
    title: "API key",
    text: `${text} It is kept in this tab only; leave it empty to forget it.`,
    label: "API key",
    value: api.keyOf("key"),
    secret: true,
  });
  if (key === null) return;
  api.setKey("key", key);
  await begin();
}

async function begin() {
  try {
    await api.models();
  } catch (error) {
    const why = api.keyOf("key") ? "The server does not know this key." : "The server asks for a key.";
    if (error.status === 401) return askForKey(why);
  }
  await fillModels();
  await open();
}

async function newSession() {
  const text = "Sessions remember apart from one another. The name of an existing one opens it.";
  const id = await ask({ title: "New session", text, label: "Name", ok: "Open" });
  if (id) tab.choose(id);
}

byId("session").addEventListener("change", () => tab.choose(byId("session").value));
byId("new-session").addEventListener("click", newSession);
byId("key").addEventListener("click", () => askForKey());
window.addEventListener("hashchange", show);
tab.addEventListener("session", open);
tab.addEventListener("locked", () => askForKey("The key is missing or wrong."));
chat.start();
memory.start();
show();
begin();
