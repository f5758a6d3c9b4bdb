"""What the API answers, typed. Fields a newer server adds are kept and reachable as attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict

__all__ = [
    "ChatOptions",
    "Learn",
    "Level",
    "Message",
    "Model",
    "Reply",
    "SessionInfo",
    "SessionRef",
    "Snapshot",
    "Usage",
    "Version",
    "as_messages",
]

Message = Mapping[str, Any]
"""An OpenAI chat message, `{"role": ..., "content": ...}`."""

Learn = Literal["all", "prompt", "off"]
"""What a turn teaches the memory: everything read and said, only what the user said, nothing."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class SessionRef(_Answer):
    """The memory a reply came from, after the turn was committed."""

    id: str
    version: int
    learned_tokens: int | None = None
    digest: str | None = None
    updates: int = 0
    updates_refused: int = 0


class Usage(_Answer):
    """Tokens read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Reply(_Answer):
    """One answer of the model. `session` is None for a memoryless turn."""

    text: str
    model: str
    finish_reason: str | None = None
    session: SessionRef | None = None
    usage: Usage | None = None


class SessionInfo(_Answer):
    """A session as the store has it."""

    id: str
    version: int
    tokens: int = 0
    bytes: int = 0
    digest: str | None = None
    created: datetime | None = None
    updated: datetime | None = None


class Version(_Answer):
    """One kept version of a session; `kind` is what made it (a turn, a reset, ...)."""

    version: int
    kind: str | None = None
    parent: int | None = None
    tokens: int = 0
    digest: str | None = None
    created: datetime | None = None


class Snapshot(_Answer):
    """A version kept until it is deleted."""

    snapshot: str
    version: int
    label: str = ""
    created: datetime | None = None


class Level(_Answer):
    """One memory level: its size, how much it holds, how far that is from the version before, and its clock.

    `change` is None where the version before is not known, the clock where the level changes with every token.
    """

    level: str
    tensors: int = 0
    bytes: int = 0
    norm: float = 0.0
    change: float | None = None
    chunk: int | None = None
    updates: int | None = None
    updates_refused: int | None = None
    tokens_since_update: int | None = None


class Model(_Answer):
    """A served model."""

    id: str


def as_messages(message: str | Sequence[Message]) -> list[dict[str, Any]]:
    """Accept the one new message of a turn as plain text."""
    if isinstance(message, str):
        return [{"role": "user", "content": message}]
    return [dict(m) for m in message]


class ChatOptions(TypedDict, total=False):
    """Options of a turn; what is left out is the server's default."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: str | Sequence[str]
    learn: Learn
    """what the turn teaches"""
    if_version: int
    """refuse the turn (`Conflict`) when the session is at another version"""
    idempotency_key: str
    """the same key gives the stored answer again instead of a second turn"""
    extra: Mapping[str, Any]
    """more fields of the request body, as they are"""
