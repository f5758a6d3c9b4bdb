"""The config fields of levels, the same in every family, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nested_runtime.errors import ConfigError
from nested_runtime.memory.level import Level, check_levels
from nested_runtime.models.config import from_fields

__all__ = ["LevelFields", "config_of", "read_levels"]


@dataclass(frozen=True, kw_only=True)
class LevelFields:
    """Config fields of every family.

    levels           adaptive levels, fastest first, each with the fields of `Level`; none = all MLPs are static
    cms              how they are combined: sequential, nested or headwise
    adaptive_blocks  how many of the last blocks have them
    recent           newest session tokens kept with a session, to be read again when it consolidates
    """

    levels: list[Any] = field(default_factory=list)
    cms: str = "sequential"
    adaptive_blocks: int = 1
    recent: int = 0


def config_of(config: LevelFields) -> dict[str, Any]:
    """The config as a mapping, without the fields of levels where there are none."""
    values = asdict(config)
    if not config.levels:
        for of_levels in fields(LevelFields):
            del values[of_levels.name]
    return values


def read_levels(config: LevelFields, chunk: int, blocks: int) -> tuple[Level, ...]:
    """The levels of a config; ConfigError names the field."""
    levels = []
    for number, values in enumerate(config.levels):
        if not isinstance(values, Mapping):
            raise ConfigError(f"levels.{number} must be an object with the fields of a level, got {values!r}")
        try:
            levels.append(from_fields(Level, values))
        except ConfigError as error:
            raise ConfigError(f"levels.{number}: {error}") from None
    check_levels(tuple(levels), chunk)
    if not 1 <= config.adaptive_blocks <= blocks:
        raise ConfigError(f"adaptive_blocks must be in 1..{blocks} (blocks), got {config.adaptive_blocks}")
    if config.recent < 0 or (levels and config.recent % levels[0].chunk):
        raise ConfigError(f"recent is {config.recent}: give 0 or a multiple of levels.0.chunk")
    return tuple(levels)
