// Elements are made here and nowhere else. Text goes in as text nodes: nothing that came from outside is ever parsed.

/** The element of an id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element. `properties` are set on it, those of `aria`, `data` and `vars` (CSS variables) as such, `on` are
 * listeners; strings among `children` become text.
 */
export function el(tag, properties = {}, ...children) {
  const { aria = {}, data = {}, vars = {}, on = {}, ...others } = properties;
  const made = Object.assign(document.createElement(tag), others);
  for (const [name, value] of Object.entries(aria)) made.setAttribute(`aria-${name}`, value);
  for (const [name, value] of Object.entries(data)) made.dataset[name] = value;
  for (const [name, value] of Object.entries(vars)) made.style.setProperty(`--${name}`, value);
  for (const [name, listener] of Object.entries(on)) made.addEventListener(name, listener);
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** A button that shows what goes wrong when it is pressed. */
export function button(text, pressed, properties = {}) {
  return el("button", { type: "button", textContent: text, on: { click: () => guarded(pressed) }, ...properties });
}

/** A table: heads of the columns, then rows of strings or elements. The first cell of a row is its head. */
export function table(caption, heads, rows) {
  const cell = (tag, scope, content) => el(tag, scope ? { scope } : {}, content);
  return el("div", { className: "scroll", tabIndex: 0, role: "region", aria: { label: caption } },
    el("table", {},
      el("caption", { className: "quiet" }, caption),
      el("thead", {}, el("tr", {}, ...heads.map((head) => cell("th", "col", head)))),
      el("tbody", {}, ...rows.map(([first, ...others]) =>
        el("tr", {}, cell("th", "row", first), ...others.map((one) => cell("td", "", one)))))));
}

/** Terms and what they are. */
export function facts(pairs) {
  return el("dl", {}, ...pairs.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))));
}

/** Run something; what goes wrong is shown. */
export async function guarded(work) {
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") notice(error.message);
    return undefined;
  }
}

/** Tell what went wrong, with buttons for what can be done. Without text: nothing is wrong any more. */
export function notice(text = "", ...actions) {
  const place = byId("notice");
  place.hidden = !text;
  const close = button("Close", () => notice());
  place.replaceChildren(...(text ? [el("p", {}, text), el("div", { className: "row" }, ...actions, close)] : []));
}

/** Tell what was done. */
export function status(text) {
  byId("status").textContent = text;
}

/** Ask for agreement, or with `label` for a text: resolves to the text ("" without a label), or null. */
export function ask({ title, text = "", label = "", value = "", ok = "OK", secret = false }) {
  const dialog = byId("dialog");
  byId("dialog-title").textContent = title;
  byId("dialog-text").textContent = text;
  byId("dialog-label").textContent = label;
  byId("dialog-ok").textContent = ok;
  const input = byId("dialog-input");
  input.type = secret ? "password" : "text";
  input.value = value;
  input.hidden = byId("dialog-label").hidden = !label;
  dialog.returnValue = "";
  return new Promise((resolve) => {
    byId("dialog-ok").value = "ok";
    byId("dialog-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => resolve(dialog.returnValue === "ok" ? (label ? input.value : "") : null);
    dialog.showModal();
    (label ? input : byId("dialog-ok")).focus();
  });
}

/** Put other elements into a place. What had the focus keeps it, if something of the same name is there again. */
export function redraw(place, ...made) {
  const nameOf = (one) => one.id || one.getAttribute("aria-label") || one.textContent;
  const focused = place.contains(document.activeElement) ? document.activeElement : null;
  const same = (one) => one.tagName === focused.tagName && nameOf(one) === nameOf(focused);
  place.replaceChildren(...made.filter((one) => one !== null));
  if (focused) [...place.querySelectorAll(focused.tagName)].find(same)?.focus();
}

/** Bytes for people. */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = count ? Math.min(Math.floor(Math.log2(count) / 10), units.length - 1) : 0;
  return `${(count / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

/** A number with three significant digits. */
export const short = (number) => (number === null ? "?" : Number(number.toPrecision(3)).toString());

/** Seconds since the epoch as local time. */
export const when = (seconds) => new Date(seconds * 1000).toLocaleString();

/** How many of something. */
export const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
