// What this tab knows: the session, its newest version as seen here, and what was said. The server keeps no transcript.

/**
 * Events: "session" (another one was chosen), "version" (its memory has changed), "locked" (a key is needed).
 *
 * version      newest one this tab has seen; 0 = the session does not exist yet. Sent as If-Match, so that a change by
 *              another tab is noticed instead of overwritten
 * transcripts  session -> messages
 */
class Tab extends EventTarget {
  session = sessionStorage.getItem("nested.session") ?? "me";
  version = 0;
  model = "";
  #transcripts = new Map();

  /** Work on another session; the empty one is memoryless. */
  choose(session) {
    this.session = session;
    this.version = 0;
    sessionStorage.setItem("nested.session", session);
    this.dispatchEvent(new Event("session"));
  }

  /** The session is at this version now. */
  saw(version) {
    this.version = version;
    this.dispatchEvent(new Event("version"));
  }

  /** Elements of the conversation with the present session. */
  get transcript() {
    if (!this.#transcripts.has(this.session)) this.#transcripts.set(this.session, []);
    return this.#transcripts.get(this.session);
  }
}

export const tab = new Tab();
