"""Sessions: request bodies and how sessions, versions and snapshots are written."""

from __future__ import annotations

from pydantic import Field

from nested_runtime.sessions.levels import LevelReport
from nested_runtime.store import base as store

from . import bodies
from .chat import Message
from .common import Closed

__all__ = [
    "MAX_VERSION",
    "ConsolidateRequest",
    "CreateRequest",
    "ForkRequest",
    "LearnRequest",
    "ResetRequest",
    "RestoreRequest",
    "SnapshotRequest",
    "info_body",
    "level_body",
    "snapshot_body",
    "version_body",
]


MAX_VERSION = (1 << 53) - 1  # what JSON numbers hold everywhere


class CreateRequest(Closed):
    """POST /v1/sessions."""

    id: str | None = Field(None, min_length=1, max_length=256, description="None = a random one")
    model: str | None = Field(None, description="None = the server's first")


class ResetRequest(Closed):
    """POST .../reset. No levels = everything."""

    levels: list[str] | str | None = Field(None, description="'all', or names such as fast, cms.1")

    @property
    def names(self) -> list[str] | None:
        """Level names; None = all."""
        if self.levels is None or self.levels in ("all", ["all"]):
            return None
        return [self.levels] if isinstance(self.levels, str) else self.levels


class SnapshotRequest(Closed):
    """POST .../snapshot."""

    version: int | None = Field(None, ge=1, le=MAX_VERSION)
    label: str = Field("", max_length=256)


class RestoreRequest(Closed):
    """POST .../restore: one of the two."""

    snapshot: str | None = None
    version: int | None = Field(None, ge=1, le=MAX_VERSION)


class ForkRequest(Closed):
    """POST .../fork."""

    id: str = Field(description="id of the new session")
    version: int | None = Field(None, ge=1, le=MAX_VERSION)


class ConsolidateRequest(Closed):
    """POST .../consolidate. Nothing = one pass, faster levels stay."""

    passes: int = Field(1, ge=1, le=64, description="times the recent tokens are read, each with a step at its end")
    decay: float = Field(0.0, ge=0, le=1, description="what the faster levels lose of what they learned")


class LearnRequest(Closed):
    """POST .../learn: text or messages to absorb without answering."""

    model: str | None = None
    text: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=4096)
    surprise: bool = Field(False, description="Report -log p of every token, as the memory read it.")


def version_body(version: store.Version) -> bodies.SessionVersion:
    """A version as JSON."""
    return {
        "version": version.number,
        "parent": version.parent,
        "source": version.source,
        "kind": version.kind,
        "model": version.model,
        "tokens": version.tokens,
        "learned_tokens": version.learned_tokens,
        "digest": version.digest,
        "bytes": version.size,
        "created": version.created,
    }


def info_body(info: store.SessionInfo) -> bodies.SessionInfo:
    """A session as JSON."""
    return {
        "id": info.key.session,
        "object": "session",
        "version": info.head.number,
        "model": info.head.model,
        "tokens": info.head.tokens,
        "learned_tokens": info.head.learned_tokens,
        "bytes": info.bytes,
        "digest": info.head.digest,
        "versions": info.versions,
        "snapshots": info.snapshots,
        "created": info.created,
        "updated": info.updated,
        "used": info.used,
    }


def level_body(report: LevelReport) -> bodies.Level:
    """A memory level as JSON. Levels that change with every token have no clock, so the last fields are null."""
    clock = report.clock
    return {
        "level": report.name,
        "tensors": report.tensors,
        "bytes": report.bytes,
        "norm": report.norm,
        "change": report.change,
        "parts": [{"name": part.name, "norm": part.norm, "change": part.change} for part in report.parts],
        "chunk": clock.level.chunk if clock else None,
        "optimizer": clock.level.optimizer if clock else None,
        "rank": clock.level.rank if clock else None,
        "max_norm": clock.level.max_norm if clock else None,
        "updates": clock.updates if clock else None,
        "updates_refused": clock.refused if clock else None,
        "tokens_since_update": clock.tokens_since_update if clock else None,
    }


def snapshot_body(snapshot: store.Snapshot) -> bodies.Snapshot:
    """A snapshot as JSON."""
    return {
        "snapshot": snapshot.id,
        "version": snapshot.version,
        "label": snapshot.label,
        "created": snapshot.created,
    }
