"""What the commands print: tables and lines for people, JSON for programs. Errors are one line on stderr."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from pydantic import BaseModel
from tqdm import tqdm

from ..python import APIError

__all__ = ["Output", "visible"]


class Output:
    """Prints answers in the form the user asked for."""

    def __init__(self, *, json: bool) -> None:
        self.json = json

    def item(self, item: BaseModel, *, text: str | None = None) -> None:
        """One answer: `text`, or its fields one to a line."""
        if self.json:
            self._dump(item.model_dump(mode="json"))
        elif text is not None:
            print(text)
        else:
            fields = item.model_dump()
            width = max(map(len, fields))
            for name, value in fields.items():
                print(f"{name:<{width}}  {_cell(value)}")

    def items(self, items: Iterable[BaseModel], columns: Sequence[str], *, empty: str) -> None:
        """A table; `empty` is what to say to people when there is nothing."""
        rows = [item.model_dump(mode="json" if self.json else "python") for item in items]
        if self.json:
            self._dump(rows)
        elif not rows:
            print(empty, file=sys.stderr)
        else:
            table = [list(columns)] + [[_cell(row.get(name)) for name in columns] for row in rows]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            for row in table:
                print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())

    def done(self, text: str, **fields: Any) -> None:
        """An action that has no answer of its own."""
        if self.json:
            self._dump(fields)
        else:
            print(text)

    @contextmanager
    def progress(self, label: str, total: int | None, unit: str = "B") -> Iterator[tqdm[Any]]:
        """A bar on stderr for work that can be counted; not for programs, and only at a terminal."""
        hidden = True if self.json else None  # None: hidden where stderr is no terminal
        scale = unit == "B"
        with tqdm(
            total=total, desc=label, unit=unit, unit_scale=scale, unit_divisor=1024, disable=hidden, leave=False
        ) as bar:
            yield bar

    @contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """The seconds that pass while the server works and nobody knows how long it will."""
        done = threading.Event()

        def tick(bar: tqdm[Any]) -> None:
            while not done.wait(0.5):
                bar.refresh()

        hidden = True if self.json else None
        with tqdm(desc=label, bar_format="{desc} {elapsed}", disable=hidden, leave=False) as bar:
            thread = threading.Thread(target=tick, args=(bar,), daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()

    def error(self, error: Exception) -> None:
        """One line on stderr, whatever the message holds."""
        if self.json:
            api = error if isinstance(error, APIError) else None
            details = {"status": api.status, "code": api.code, "param": api.param} if api else {}
            print(
                json.dumps({"error": {"message": str(error), "kind": type(error).__name__, **details}}), file=sys.stderr
            )
        else:
            print(f"nested: {visible(' '.join(str(error).split()))}", file=sys.stderr)

    @staticmethod
    def _dump(value: Any) -> None:
        print(json.dumps(value, ensure_ascii=False))


def visible(text: str, kept: str = "\n\t") -> str:
    """Text with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() or c in kept else "\N{REPLACEMENT CHARACTER}" for c in text)


def _cell(value: Any) -> str:
    """One value on one line."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().isoformat(sep=" ", timespec="seconds")
    return visible(str(value), kept="")
