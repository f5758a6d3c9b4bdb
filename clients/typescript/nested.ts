// The openai package bound to a session, and the session API, typed. Copy this file and session-api.ts.
import OpenAI, { type ClientOptions } from "openai";
import createClient from "openapi-fetch";

import type { MemoryOptions, paths, SessionRef } from "./session-api.js";

export type * from "./session-api.js";

/** What a turn adds to OpenAI's request. */
export interface Memory {
  memory?: MemoryOptions;
}

/** openai's retries send no key of their own accord: a turn that was answered into a cut connection would be taught twice. */
class Bound extends OpenAI {
  protected override idempotencyHeader = "Idempotency-Key";
}

/** An `openai` client whose requests go to one memory. */
export function openai(session: string, baseURL = "http://127.0.0.1:8000/v1", options: ClientOptions = {}): OpenAI {
  const defaultHeaders = { ...options.defaultHeaders, "X-Session-ID": session };
  return new Bound({ apiKey: "none", ...options, baseURL, defaultHeaders });
}

/** What became of the memory: in every answer, and in the last chunk of a stream. */
export function sessionOf(answer: object): SessionRef | undefined {
  return "session" in answer ? (answer.session as SessionRef) : undefined;
}

/** The session API. */
export function sessions(baseUrl = "http://127.0.0.1:8000", apiKey?: string) {
  return createClient<paths>({ baseUrl, headers: apiKey === undefined ? {} : { Authorization: `Bearer ${apiKey}` } });
}
