// The memory inspector: levels, heat strip, versions, snapshots, export and import.

import * as api from "./api.js";
import { ask, byId, button, bytes, count, el, facts, guarded, notice, redraw, short, status, table, when } from "./dom.js";
import { strip } from "./strip.js";
import { tab } from "./tab.js";

const seen = new Map(); // "session digest" -> levels: what a version holds never changes
const lines = new Map(); // session -> versions this tab has seen, gone ones included
let selected = 0;
let by = "change";
let drawing = 0;

/** Draw the inspector when the session or its version changes; call once. */
export function start() {
  tab.addEventListener("session", () => ((selected = 0), draw()));
  tab.addEventListener("version", draw);
}

async function draw() {
  const mine = ++drawing;
  const id = tab.session;
  const place = byId("inspector");
  if (!id) return redraw(place, el("p", {}, "No session: nothing is remembered. Choose one, or make one."));
  const found = await guarded(() => load(id));
  if (mine !== drawing || found === undefined) return;
  redraw(place, ...(found ? view(id, found) : empty(id)));
}

/** Everything shown, or null while the session does not exist. */
async function load(id) {
  const info = await api.info(id);
  if (!info) {
    lines.delete(id);
    return null;
  }
  const [kept, snapshots] = await Promise.all([api.history(id), api.snapshots(id)]);
  await Promise.all(kept.map((version) => levelsOf(id, version)));
  const line = new Map(lines.get(id) ?? []);
  if ([...line.values()].some((one) => kept.some((other) => isOther(one, other)))) line.clear(); // the id began afresh
  for (const one of line.values()) one.kept = false;
  for (const version of kept) line.set(version.version, { ...version, kept: true });
  lines.set(id, line);
  return { info, kept, snapshots, line: [...line.values()].sort((a, b) => a.version - b.version) };
}

const isOther = (one, other) => one.version === other.version && one.created !== other.created;

async function levelsOf(id, version) {
  const name = `${id} ${version.version} ${version.digest}`;
  if (seen.has(name)) return;
  try {
    seen.set(name, await api.levels(id, version.version));
  } catch (error) {
    if (error.status !== 404) throw error; // a turn has just pushed it out of the history
  }
}

const levels = (id, version) => seen.get(`${id} ${version.version} ${version.digest}`) ?? null;

function empty(id) {
  return [el("p", {}, `Session “${id}” has read nothing yet. The first message makes it.`), importer(id)];
}

function view(id, { info, snapshots, line }) {
  const head = line.at(-1);
  const chosen = line.find((one) => one.version === selected && one.kept) ?? head;
  return [
    facts([
      ["Model", info.model],
      ["Version", String(info.version)],
      ["Tokens read", String(info.tokens)],
      ["Size", bytes(info.bytes)],
      ["Digest", info.digest.slice(0, 12)],
    ]),
    el("h3", {}, "Levels"),
    levelTable(id, head, levels(id, head)),
    heat(id, line),
    el("h3", {}, "Versions"),
    history(line, chosen),
    details(id, chosen, head),
    el("h3", {}, "Snapshots"),
    snapshotTable(id, snapshots),
    el("h3", {}, "Move and erase"),
    importer(id),
    el("div", { className: "row" }, button("Erase session…", () => erase(id))),
  ];
}

function levelTable(id, head, found) {
  const rows = (found ?? []).map(({ level, norm, change, bytes: size, ...clock }) => [
    level,
    updates(clock, head),
    short(norm),
    short(change),
    bytes(size),
    button(`Reset ${level}`, () => reset(id, [level])),
  ]);
  const made = table("Memory levels", ["Level", "Updates", "Norm", "Moved by", "Size", "Reset"], rows);
  made.append(el("div", { className: "row" }, button("Reset everything", () => reset(id, null))));
  return made;
}

/** How often a level has learned. */
function updates({ chunk, updates, updates_refused: refused, tokens_since_update: since }, head) {
  if (chunk === null) return `each token (${head.tokens} read)`;
  return `${count(updates, "step")}${refused ? `, ${refused} refused` : ""}; ${since} of ${chunk} tokens to the next`;
}

function heat(id, line) {
  const drawn = () => strip(line.map((one) => ({ version: one.version, levels: levels(id, one) })), by);
  const place = el("div", {}, drawn());
  const choice = el("select", { id: "heat-by", on: { change: () => ((by = choice.value), place.replaceChildren(drawn())) } },
    el("option", { value: "change" }, "change"), el("option", { value: "norm" }, "norm"));
  choice.value = by;
  return el("div", {}, el("div", { className: "row" }, el("label", { htmlFor: "heat-by" }, "Colour by"), choice), place);
}

/** The versions as a line of buttons; one is chosen. */
function history(line, chosen) {
  const dot = (one) => el("li", {}, button(`v${one.version}`, () => {
    selected = one.version;
    return draw();
  }, {
    className: `dot ${one.kind}`,
    disabled: !one.kept,
    title: `${one.kind}, ${when(one.created)}${one.kept ? "" : ", no longer kept"}`,
    ariaPressed: String(one === chosen),
  }));
  return el("ol", { className: "line", aria: { label: "Versions, oldest first" } }, ...line.map(dot));
}

function details(id, one, head) {
  const source = one.source ?? one.parent;
  const origin = source ? `version ${source}` : "nothing";
  return el("div", { className: "card" },
    facts([
      ["Version", `${one.version}${one === head ? " (newest)" : ""}`],
      ["Made by", `${one.kind}, from ${origin}`],
      ["When", when(one.created)],
      ["Tokens read", String(one.tokens)],
      ["Size at rest", bytes(one.bytes)],
    ]),
    el("div", { className: "row" },
      one === head ? null : button("Restore", () => restore(id, { version: one.version })),
      button("Branch…", () => branch(id, one.version)),
      button("Snapshot…", () => keep(id, one.version)),
      button("Export", () => download(id, one.version))));
}

function snapshotTable(id, found) {
  if (!found.length) return el("p", {}, "None. A snapshot keeps a version for as long as you like.");
  return table("Snapshots", ["Label", "Version", "Taken", "", ""], found.map((one) => [
    one.label || one.snapshot.slice(0, 8),
    `v${one.version}`,
    when(one.created),
    button("Restore", () => restore(id, { snapshot: one.snapshot })),
    button("Forget", () => change(async () => {
      await api.forgetSnapshot(id, one.snapshot);
      return "The snapshot is forgotten.";
    })),
  ]));
}

let chosen = null;

/** The row to import a file; a file that was chosen stays chosen while the page is drawn again. */
function importer(id) {
  if (chosen?.session !== id) {
    chosen = { session: id, file: el("input", { type: "file", id: "import", accept: ".safetensors" }) };
  }
  const { file } = chosen;
  const load = button("Import", () => change(async () => {
    if (!file.files.length) throw new Error("Choose an exported file first.");
    const made = await api.importFile(id, tab.version, file.files[0], byId("model").value);
    file.value = "";
    return `Imported as version ${made.version}.`;
  }));
  return el("div", { className: "row" }, el("label", { htmlFor: "import" }, "Memory file"), file, load);
}

/** Do something that changes the session, say what was done, and look at the session again. */
async function change(work) {
  const id = tab.session;
  notice();
  try {
    status(await work());
  } catch (error) {
    const words = error.code === "version_conflict"
      ? "This session was changed elsewhere in the meantime. Nothing was done; look at what it holds now and try again."
      : error.message;
    notice(words);
  }
  if (id !== tab.session) return;
  const found = await api.info(id);
  tab.saw(found ? found.version : 0);
}

async function reset(id, names) {
  const what = names ? `level ${names.join(", ")}` : "everything";
  const text = `Make ${what} of “${id}” fresh? The versions before stay in the history while they are kept.`;
  if ((await ask({ title: "Reset", text, ok: "Reset" })) === null) return;
  await change(async () => `Reset: version ${(await api.reset(id, tab.version, names)).version}.`);
}

const restore = (id, from) =>
  change(async () => {
    const made = await api.restore(id, tab.version, from);
    selected = 0;
    return `Restored version ${made.source} as version ${made.version}.`;
  });

async function branch(id, version) {
  const text = `A new session that begins with version ${version} of “${id}”.`;
  const target = await ask({ title: "Branch", text, label: "Name of the new session", ok: "Branch" });
  if (!target) return;
  await change(async () => {
    await api.fork(id, target, version);
    tab.choose(target);
    return `“${target}” begins with version ${version} of “${id}”.`;
  });
}

async function keep(id, version) {
  const text = `Version ${version} is kept until the snapshot is forgotten.`;
  const label = await ask({ title: "Snapshot", text, label: "Label", ok: "Keep" });
  if (label === null) return;
  await change(async () => `Kept as ${(await api.snapshot(id, version, label)).snapshot}.`);
}

async function download(id, version) {
  const url = URL.createObjectURL(await api.exportFile(id, version));
  el("a", { href: url, download: `session-v${version}.safetensors` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
  status(`Version ${version} is downloaded. Whoever has the file has what the memory learned.`);
}

async function erase(id) {
  const text = `Erase “${id}” with its versions and snapshots, for good?`;
  if ((await ask({ title: "Erase", text, ok: "Erase" })) === null) return;
  await change(async () => {
    await api.erase(id, tab.version);
    return `“${id}” is erased.`;
  });
}
