// The admin view: engines, store and all sessions, behind the admin key.

import * as api from "./api.js";
import { ask, byId, button, bytes, count, el, facts, guarded, notice, redraw, status, table, when } from "./dom.js";

const SECONDS = 3;
let shown = false;
let cursor = null;

/** Refresh the view now and then while it is shown. */
export function show(is) {
  if (is === shown) return;
  shown = is;
  if (is) tick();
}

async function tick() {
  if (!shown) return;
  await draw();
  setTimeout(tick, SECONDS * 1000);
}

async function draw() {
  try {
    const [stats, page] = await Promise.all([api.adminStats(), api.adminSessions(cursor)]);
    redraw(byId("admin-view"), ...view(stats, page));
  } catch (error) {
    shown = false;
    redraw(byId("admin-view"), locked(error));
  }
}

function locked(error) {
  const why = error.status === 404 ? "The admin API is off: the server was started without an admin key." : error.message;
  return el("div", {}, el("p", {}, why), el("div", { className: "row" }, keyButton(), button("Try again", () => show(true))));
}

function keyButton() {
  return button("Admin key…", async () => {
    const text = "It is kept in this tab only. Leave it empty to forget it.";
    const key = await ask({ title: "Admin key", text, label: "Admin key", value: api.keyOf("admin"), secret: true });
    if (key === null) return;
    api.setKey("admin", key);
    shown = false;
    show(true);
  });
}

function view(stats, page) {
  return [
    ...Object.entries(stats.models).map(([name, one]) => engine(name, one)),
    el("h3", {}, "Store"),
    facts([
      ["Sessions", String(stats.store.sessions)],
      ["Versions", String(stats.store.versions)],
      ["Snapshots", String(stats.store.snapshots)],
      ["At rest", bytes(stats.store.bytes)],
      ["Durability", stats.store.durability],
      ["In memory", `${count(stats.resident.states, "state")}, ${bytes(stats.resident.bytes)}`],
      ["Takes work", stats.accepting ? "yes" : "no, it is shutting down"],
    ]),
    el("div", { className: "row" },
      button("Refresh", draw),
      button("Drop states from memory", async () => {
        status(`${count((await api.adminEvict()).evicted, "state")} dropped; they are read again when needed.`);
        await draw();
      }),
      keyButton()),
    el("h3", {}, "Sessions"),
    table("Sessions of all tenants", ["Session", "Tenant", "Version", "Tokens", "Size", "Last change", "Erase"],
      page.data.map(session)),
    el("div", { className: "row" },
      cursor ? button("First page", () => turn(null)) : null,
      page.next ? button("Next page", () => turn(page.next)) : null),
  ];
}

function engine(name, one) {
  const used = one.slots - one.slots_free;
  return el("div", { className: "card" },
    el("h3", {}, name),
    el("label", {}, `Slots: ${used} of ${one.slots} used `, el("meter", { max: one.slots, value: used })),
    facts([
      ["Running", String(one.running)],
      ["Queue", String(one.waiting)],
      ["Steps", String(one.steps)],
      ["Tokens read", String(one.prompt_tokens)],
      ["Tokens written", String(one.sampled_tokens)],
      ["Level updates", `${one.updates} (${one.updates_refused} refused)`],
    ]));
}

const session = (one) => [
  one.id, one.tenant, String(one.version), String(one.tokens), bytes(one.bytes), when(one.updated),
  button("Erase…", () => erase(one), { ariaLabel: `Erase ${one.id} of ${one.tenant}` }),
];

async function erase({ tenant, id }) {
  const text = `Erase session “${id}” of tenant “${tenant}” with its versions and snapshots, for good?`;
  if ((await ask({ title: "Erase", text, ok: "Erase" })) === null) return;
  await api.adminErase(tenant, id);
  status(`“${id}” is erased.`);
  notice();
  await draw();
}

async function turn(to) {
  cursor = to;
  await guarded(draw);
}
