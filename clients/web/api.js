// The HTTP API. Keys are kept in this tab only (sessionStorage) and sent with every request of this page, never in a URL.

const BASE = new URL("./", document.baseURI);
const names = { key: "nested.key", admin: "nested.admin-key" };

/** An answer of the server that is an error, or no answer at all (status 0). */
export class ApiError extends Error {
  constructor(status, { message, code = null }) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
  }
}

/** The key of this tab, "key" or "admin"; empty if there is none. */
export const keyOf = (which) => sessionStorage.getItem(names[which]) ?? "";

/** Keep a key in this tab, or forget it. */
export function setKey(which, value) {
  if (value) sessionStorage.setItem(names[which], value);
  else sessionStorage.removeItem(names[which]);
}

async function send(method, path, { body, raw, version, signal } = {}) {
  const headers = new Headers();
  const key = keyOf(path.startsWith("admin/") ? "admin" : "key");
  if (key) headers.set("Authorization", `Bearer ${key}`);
  if (body !== undefined) headers.set("Content-Type", "application/json");
  if (version !== undefined) headers.set("If-Match", String(version));
  const content = body === undefined ? raw : JSON.stringify(body);
  let reply;
  try {
    reply = await fetch(new URL(path, BASE), { method, headers, body: content, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server cannot be reached. Is it running?", code: "unreachable" });
  }
  if (!reply.ok) throw await errorOf(reply);
  return reply;
}

async function errorOf(reply) {
  try {
    return new ApiError(reply.status, (await reply.json()).error);
  } catch {
    return new ApiError(reply.status, { message: `The server answered ${reply.status} ${reply.statusText}` });
  }
}

const json = async (...call) => (await send(...call)).json();
const session = (id, rest = "") => `v1/sessions/${encodeURIComponent(id)}${rest}`;

/** Models, sessions. */
export const models = async () => (await json("GET", "v1/models")).data;

/** The caller's sessions, at most 500. */
export async function sessions() {
  const found = [];
  for (let cursor = ""; cursor !== null && found.length < 500; ) {
    const page = await json("GET", `v1/sessions?limit=100${cursor && `&cursor=${encodeURIComponent(cursor)}`}`);
    found.push(...page.data);
    cursor = page.next;
  }
  return found;
}

/** The session, or null if there is none yet. */
export async function info(id) {
  try {
    return await json("GET", session(id));
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

export const history = async (id) => (await json("GET", session(id, "/history"))).data;
export const snapshots = async (id) => (await json("GET", session(id, "/snapshots"))).data;
export const levels = async (id, version) => (await json("GET", session(id, `/levels?version=${version}`))).data;

/** Changes; those of the memory itself with the version that this tab believes to be the newest. */
export const reset = (id, version, names) =>
  json("POST", session(id, "/reset"), { body: { levels: names ?? "all" }, version });
export const restore = (id, version, from) => json("POST", session(id, "/restore"), { body: from, version });
export const fork = (id, target, from) => json("POST", session(id, "/fork"), { body: { id: target, version: from } });
export const snapshot = (id, from, label) =>
  json("POST", session(id, "/snapshot"), { body: { version: from, label } });
export const forgetSnapshot = (id, name) =>
  json("DELETE", session(id, `/snapshots/${encodeURIComponent(name)}`));
export const erase = (id, version) => json("DELETE", session(id), { version });
export const learn = (id, version, text, model) =>
  json("POST", session(id, "/learn"), { body: { text, model, surprise: true }, version });
export const importFile = (id, version, file, model) =>
  json("PUT", session(id, `/import?model=${encodeURIComponent(model)}`), { raw: file, version });

/** The memory as a file. */
export const exportFile = async (id, version) =>
  (await send("GET", session(id, `/export?version=${version}`))).blob();

/** A chat turn: yields the chunks of the stream as they come. */
export async function* chat(body, { version, signal } = {}) {
  const reply = await send("POST", "v1/chat/completions", { body: { ...body, stream: true }, version, signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let done = false; !done; ) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: "The connection broke off in the middle of the answer.", code: "unreachable" });
    }
    done = read.done;
    text += read.value ?? "";
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a keep-alive comment
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new ApiError(reply.status, chunk.error);
      yield chunk;
    }
  }
  throw new ApiError(0, { message: "The connection broke off in the middle of the answer.", code: "unreachable" });
}

/** The admin API. */
export const adminStats = () => json("GET", "admin/stats");
export const adminSessions = (cursor) =>
  json("GET", `admin/sessions?limit=100${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);
export const adminErase = (tenant, id) =>
  json("DELETE", `admin/tenants/${encodeURIComponent(tenant)}/sessions/${encodeURIComponent(id)}`);
export const adminEvict = () => json("POST", "admin/evict");
