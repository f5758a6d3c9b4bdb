// The conversation: messages, streamed replies, and what the memory made of them.

import * as api from "./api.js";
import { byId, button, count, el, guarded, notice, status } from "./dom.js";
import { ofReading, ofReply } from "./surprise.js";
import { tab } from "./tab.js";

let running = null; // AbortController of the turn in progress

/** Wire the form; call once. */
export function start() {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  byId("stop").addEventListener("click", () => running?.abort());
  tab.addEventListener("session", () => {
    running?.abort();
    byId("log").replaceChildren(...tab.transcript);
    notice();
  });
}

function submit() {
  const text = byId("text").value.trim();
  if (!text || running) return;
  byId("text").value = "";
  const turn = { session: tab.session, version: tab.version, text, mode: byId("mode").value, id: newId() };
  guarded(() => run(turn));
}

/** Random, for the idempotency key: a repeated request teaches nothing twice. */
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function run(turn) {
  notice();
  busy(true);
  running = new AbortController();
  const asked = say("user", "You", turn.text);
  const ways = { chat: answer, look: answer, read: absorb, compare };
  try {
    await ways[turn.mode](turn, asked, running.signal);
  } catch (error) {
    asked.remove();
    failed(turn, error);
  } finally {
    running = null;
    busy(false);
    byId("ask").scrollIntoView({ block: "nearest" });
  }
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  byId("conversation").setAttribute("aria-busy", String(is));
}

/** A message in the log. */
function say(kind, who, text) {
  const body = el("p", { className: "text" }, text);
  const made = el("li", { className: `message ${kind}` }, el("h3", {}, who), body);
  tab.transcript.push(made);
  byId("log").append(made);
  made.scrollIntoView({ block: "nearest" });
  return {
    body,
    add: (...more) => made.append(...more),
    note: (words) => made.append(el("p", { className: "note" }, words)),
    show: (found) => found && (body.replaceWith(found.text), made.append(found.numbers)),
    remove: () => {
      made.remove();
      if (tab.transcript.includes(made)) tab.transcript.splice(tab.transcript.indexOf(made), 1);
    },
  };
}

function request(turn, session, learn) {
  return {
    model: byId("model").value,
    messages: [{ role: "user", content: turn.text }],
    temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("length").value),
    logprobs: true,
    ...(session ? { session_id: session, memory: { learn, surprise: true } } : {}),
    ...(session && learn === "all" ? { request_id: turn.id } : {}),
  };
}

/** Stream a reply into an element; the tokens, and what the last chunk says of the session. */
async function stream(body, into, options) {
  const tokens = [];
  let text = "";
  let session = null;
  for await (const chunk of api.chat(body, options)) {
    for (const choice of chunk.choices) {
      text += choice.delta.content ?? "";
      tokens.push(...(choice.logprobs?.content ?? []));
    }
    into.textContent = text;
    session = chunk.session ?? session;
  }
  return { text, tokens, session };
}

async function answer(turn, asked, signal) {
  const learns = turn.session !== "" && turn.mode === "chat";
  const reply = say("model", "Model", "");
  try {
    const version = learns ? turn.version : undefined;
    const done = await stream(request(turn, turn.session, learns ? "all" : "off"), reply.body, { version, signal });
    if (done.session) asked.show(ofReading(done.session.surprise ?? [], turn.text));
    reply.show(ofReply(done.tokens, done.text));
    reply.note(outcome(done.session, learns));
    if (learns && turn.session === tab.session) tab.saw(done.session.version);
    status("The answer is complete.");
  } catch (error) {
    reply.remove();
    throw error;
  }
}

function outcome(session, learns) {
  if (!session) return "No memory: nothing was kept.";
  if (!learns) return `Answered from version ${session.version}; nothing was learned.`;
  return `Learned: version ${session.version}, ${count(session.learned_tokens, "token")}, ${session.durability}.`;
}

async function absorb(turn, asked) {
  if (!turn.session) throw new Error("Reading needs a memory: choose a session first.");
  const { session } = await api.learn(turn.session, turn.version, turn.text, byId("model").value);
  asked.show(ofReading(session.surprise, turn.text));
  asked.note(outcome(session, true));
  if (turn.session === tab.session) tab.saw(session.version);
}

async function compare(turn, _asked, signal) {
  if (!turn.session) throw new Error("Comparing needs a memory: choose a session first.");
  const both = say("model", "Model", "");
  const side = (title) => {
    const body = el("p", { className: "text" });
    const half = el("div", { className: "half" }, el("h4", {}, title), body);
    return { body, half };
  };
  const [withMemory, without] = [side(`With memory (version ${turn.version})`), side("Without memory")];
  both.body.replaceWith(el("div", { className: "split" }, withMemory.half, without.half));
  try {
    const ends = await Promise.all([
      stream(request(turn, turn.session, "off"), withMemory.body, { signal }),
      stream(request(turn, "", "off"), without.body, { signal }),
    ]);
    [withMemory, without].forEach(({ body, half }, index) => {
      const found = ofReply(ends[index].tokens, ends[index].text);
      if (!found) return;
      body.replaceWith(found.text);
      half.append(found.numbers);
    });
    both.note("Nothing was learned.");
  } catch (error) {
    both.remove();
    throw error;
  }
}

/** Say what became of a turn that failed; the text goes back into the form, and may be sent again. */
function failed(turn, error) {
  if (error.name === "AbortError") {
    back(turn);
    status("Stopped. Nothing was learned.");
    return;
  }
  if (error.code === "version_conflict") {
    conflict(turn);
  } else if (error.code === "unreachable" || error.status === 503) {
    notice(`${error.message} If the answer was ready, trying again repeats it and teaches nothing twice.`,
      button("Try again", () => run(turn)));
  } else if (error.status === 401) {
    back(turn);
    tab.dispatchEvent(new Event("locked"));
  } else {
    back(turn);
    notice(error.message);
  }
}

function back(turn) {
  if (turn.session === tab.session && !byId("text").value) byId("text").value = turn.text;
}

/** Another tab or program was first. */
async function conflict(turn) {
  const found = await guarded(() => api.info(turn.session));
  if (found === undefined) return back(turn);
  const version = found ? found.version : 0;
  const words = `This session was changed elsewhere: it is at version ${version}, this tab knew version ${turn.version}. ` +
    "Your message was not read and nothing was overwritten.";
  if (turn.session === tab.session) tab.saw(version);
  notice(words,
    button(`Send to version ${version}`, () => run({ ...turn, version, id: newId() })),
    button("Edit first", () => (notice(), back(turn), byId("text").focus())));
}
