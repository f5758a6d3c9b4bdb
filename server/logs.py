"""Log lines for people or, with --log-format json, for machines: one JSON object a line."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import orjson

__all__ = ["FIELDS", "configure"]

FIELDS = "fields"  # attribute of a record: what the line says, as a mapping


class _Json(logging.Formatter):
    """time, level, logger, message or the record's fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, FIELDS, None)
        line |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure(kind: str) -> None:
    """Log to standard error from now on, as `text` or `json`."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_Json() if kind == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
