// The heat strip: a table with a column for each version and a row for each level and its parts.

import { el, short } from "./dom.js";

/**
 * `columns`: [{ version, levels }] oldest first, where `levels` is null if that version is gone. `by` is "change" or
 * "norm". A row's largest number is its hottest cell: rows are not compared with one another.
 */
export function strip(columns, by) {
  const known = columns.filter((column) => column.levels);
  if (!known.length) return el("p", {}, "Nothing was learned yet.");
  const rows = known.at(-1).levels.flatMap((level, index) => [
    row(level.level, "level", columns, (levels) => levels[index]?.[by]),
    ...(level.parts.length > 1 ? level.parts : []).map((part, place) =>
      row(part.name, "part", columns, (levels) => levels[index]?.parts[place]?.[by])),
  ]);
  const caption = by === "change" ? "How far each version moved the memory" : "Norm of the memory in each version";
  return el("div", { className: "scroll", tabIndex: 0, role: "region", aria: { label: caption } },
    el("p", { className: "note" }, `${caption}: the strongest colour of a row is its largest number.`),
    el("table", { className: "heat" },
      el("caption", { className: "quiet" }, caption),
      el("thead", {}, el("tr", {},
        el("th", { scope: "col" }, "Level"),
        ...columns.map(({ version }) => el("th", { scope: "col" }, `v${version}`)))),
      el("tbody", {}, ...rows)));
}

function row(name, kind, columns, read) {
  const values = columns.map(({ levels }) => (levels ? read(levels) ?? null : null));
  const top = Math.max(...values.filter((value) => value !== null), 0);
  return el("tr", { className: kind }, el("th", { scope: "row" }, name), ...values.map((value) => cell(value, top)));
}

function cell(value, top) {
  const heat = value === null || !top ? 0 : value / top;
  const said = value === null ? "not known" : short(value);
  return el("td", { title: said, className: value === null ? "unknown" : "", vars: { h: heat.toFixed(3) } },
    el("span", { className: "quiet" }, said));
}
