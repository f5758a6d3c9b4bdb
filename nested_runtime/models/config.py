"""Strict reading of a config mapping into a frozen dataclass: every problem names its field."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_origin, get_type_hints

from nested_runtime.errors import ConfigError

__all__ = ["from_fields"]

T = TypeVar("T")
POSITIVE = (
    "vocab_size",
    "dim",
    "blocks",
    "heads",
    "head_dim",
    "chunk",
    "conv_width",
    "mlp_ratio",
    "window",
    "max_context",
)


def from_fields(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build `kind` from `values`; unknown, missing, mistyped or non-positive fields are ConfigErrors."""
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # T is always a dataclass here
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"unknown config field {unknown[0]!r}; known: {', '.join(sorted(known))}")
    for name, field in known.items():
        if name not in values:
            if field.default is MISSING and field.default_factory is MISSING:
                raise ConfigError(f"config field {name!r} is missing")
            continue
        _check(name, values[name], hints[name])
    return kind(**values)


def _check(name: str, value: Any, hint: Any) -> None:
    allowed = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(get_origin(t) or t for t in allowed)
    if float in plain:
        plain += (int,)  # JSON writes 1.0 as 1 as often as not
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        raise ConfigError(f"config field {name!r} must be {hint}, got {value!r}")
    if name in POSITIVE and isinstance(value, int) and value < 1:
        raise ConfigError(f"config field {name!r} must be at least 1, got {value}")
