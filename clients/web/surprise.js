// Surprise under text: -log p of every token, in nats. The bar under a token is as high as it was surprising.

import { el, short } from "./dom.js";

const FULL = 10; // nats at which a bar is full: once in 22,000

/** Tokens with bytes as pieces of text. A character that spans tokens belongs to the last of them. */
function pieces(tokens) {
  const decoder = new TextDecoder();
  const found = [];
  let waiting = 0;
  for (const { bytes, surprise } of tokens) {
    const text = decoder.decode(new Uint8Array(bytes), { stream: true });
    waiting += surprise;
    if (!text) continue;
    found.push({ text, surprise: waiting });
    waiting = 0;
  }
  return found;
}

/** The pieces that make up `text`, the template around it left out. */
function within(found, text) {
  const whole = found.map((one) => one.text).join("");
  const begin = whole.lastIndexOf(text);
  if (begin < 0) return found;
  let place = 0;
  const cut = found.map(({ text: own, surprise }) => {
    const from = Math.max(begin - place, 0);
    const kept = own.slice(from, Math.max(begin + text.length - place, 0));
    place += own.length;
    return { text: kept, surprise };
  });
  return cut.filter((one) => one.text);
}

/** The user's text with the surprise of the memory that read it: entries of `session.surprise`. */
export const ofReading = (entries, text) => view(within(pieces(entries.filter((one) => !one.special)), text), "read");

/** The reply with the surprise of its own tokens: entries of OpenAI's `logprobs.content`. */
export function ofReply(entries, text) {
  const tokens = entries.map(({ bytes, logprob }) => ({ bytes, surprise: -logprob }));
  return view(within(pieces(tokens), text), "chosen");
}

/** Text with bars, a summary in words, and the numbers. Null when there is nothing to show. */
function view(found, verb) {
  if (!found.length) return null;
  const mean = found.reduce((sum, one) => sum + one.surprise, 0) / found.length;
  const most = found.reduce((best, one) => (one.surprise > best.surprise ? one : best));
  const height = ({ surprise }) => Math.min(surprise / FULL, 1).toFixed(3);
  const said = `Surprise as it was ${verb}: mean ${short(mean)} nats, most ${short(most.surprise)} at “${most.text.trim()}”`;
  return {
    text: el("p", { className: "tokens" }, ...found.map((one) =>
      el("span", { className: "token", title: `${short(one.surprise)} nats`, vars: { s: height(one) } }, one.text))),
    numbers: el("details", { className: "numbers" },
      el("summary", {}, said),
      el("ul", {}, ...found.map((one) => el("li", {}, el("code", {}, one.text), ` ${short(one.surprise)}`)))),
  };
}
