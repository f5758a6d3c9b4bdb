"""Figures of a run: rows with intervals, breakdowns, the table on the screen and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_runtime.evals.measures import Item
from nested_runtime.evals.scoring import wilson

__all__ = ["Row", "aligned", "breakdown", "item_body", "rows", "table", "write"]

ASKED = {"recall": "", "update": ": corrected", "unknown": ": never told"}
GROUPS: Mapping[str, Callable[[Item], str]] = {
    "family": lambda item: item.question.family,
    "value kind": lambda item: item.question.value_kind,
    "value tokens": lambda item: str(min(item.tokens, 8)) + ("+" if item.tokens >= 8 else ""),
}


@dataclass(frozen=True)
class Row:
    """Figures over some items. Shares are None where there is nothing to count."""

    name: str
    items: Sequence[Item]

    @property
    def right(self) -> int:
        """Right answers."""
        return sum(item.right for item in self.items)

    def body(self) -> dict[str, Any]:
        """All figures as JSON."""
        low, high = wilson(self.right, len(self.items))
        forced = [item.forced for item in self.items if item.forced is not None and item.forced.hits]
        return {
            "name": self.name,
            "questions": len(self.items),
            "right": self.right,
            "share": _share([item.right for item in self.items]),
            "low": low,
            "high": high,
            "says_unknown": _share([item.denied for item in self.items]),
            "control_right": sum(item.control_right for item in self.items),
            "control_share": _share([item.control_right for item in self.items]),
            "first_token": _share([each.hits[0] for each in forced]),
            "first_token_control": _share([each.control[0] for each in forced]),
            "value_tokens": _share([hit for each in forced for hit in each.hits]),
            "value_tokens_control": _share([hit for each in forced for hit in each.control]),
        }


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def rows(items: Iterable[Item]) -> list[Row]:
    """One row per plan and kind of question, in the order of the items."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.plan + ASKED[item.question.kind], []).append(item)
    return [Row(name, group) for name, group in groups.items()]


def breakdown(items: Iterable[Item]) -> dict[str, list[Row]]:
    """Rows of what was told, by family of the relation, kind of the value and number of its tokens."""
    told = [item for item in items if item.question.kind != "unknown"]
    out: dict[str, list[Row]] = {}
    for name, key in GROUPS.items():
        names = sorted({key(item) for item in told})
        out[name] = [Row(each, [item for item in told if key(item) == each]) for each in names]
    return out


HEAD = ("right", "of", "share", "95 %", "control", "says unknown", "1st token", "control", "value tokens", "control")
SHARES = ("control_share", "says_unknown", "first_token", "first_token_control", "value_tokens", "value_tokens_control")


def table(title: str, rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    return aligned([(title, *HEAD), *(_cells(row.body()) for row in rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _cells(body: Mapping[str, Any]) -> tuple[str, ...]:
    interval = f"{percent(body['low'])} - {percent(body['high'])}"
    counts = (str(body["right"]), str(body["questions"]), percent(body["share"]), interval)
    return (body["name"], *counts, *(percent(body[name]) for name in SHARES))


def percent(share: float | None) -> str:
    """A share for the table."""
    return "-" if share is None else f"{100 * share:.1f}"


def item_body(item: Item) -> dict[str, Any]:
    """One question as JSON."""
    question = item.question
    return {
        "plan": item.plan,
        "session": item.session,
        "kind": question.kind,
        "relation": question.relation,
        "family": question.family,
        "value_kind": question.value_kind,
        "value_tokens": item.tokens,
        "question": question.text,
        "expected": question.expected,
        "outdated": list(question.outdated),
        "answer": item.answer,
        "right": item.right,
        "says_unknown": item.denied,
        "control": item.control,
        "control_right": item.control_right,
        "forced": list(item.forced.hits) if item.forced else None,
        "forced_control": list(item.forced.control) if item.forced else None,
    }


def write(path: Path, body: Mapping[str, Any]) -> None:
    """Write the JSON file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
