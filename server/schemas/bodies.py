"""The answers of the session API as typed dictionaries: what mypy checks, and what the OpenAPI document says.

Handlers write plain JSON; nothing is validated on the way out. That the answers are these is shown by
`tests/server/test_bodies.py`, which looks at every one of them.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

__all__ = [
    "BODIES",
    "Level",
    "SessionInfo",
    "SessionRef",
    "SessionVersion",
    "Snapshot",
    "schemas",
]


class TokenSurprise(TypedDict):
    """-log p (nats) of a token as the memory read it; `special` marks the template's own."""

    token: str
    bytes: list[int]
    surprise: float
    special: bool


class SessionRef(TypedDict):
    """What became of the session: in the body of every turn, and in the last chunk of a streamed one."""

    id: str
    version: int
    learned_tokens: int
    digest: str
    durability: str
    history: str
    updates: int
    updates_refused: int
    surprise: NotRequired[list[TokenSurprise]]


class SessionVersion(TypedDict):
    """One version; times are seconds since the epoch."""

    version: int
    parent: int | None
    source: int | None
    kind: str
    model: str
    tokens: int
    learned_tokens: int
    digest: str
    bytes: int
    created: float


class WrittenVersion(SessionVersion):
    """The version that this request wrote."""

    id: str


class Consolidated(WrittenVersion):
    """The version of a consolidation, the recent tokens that were read again, and the levels that learned them."""

    tokens_read: int
    into: list[str]


class SessionInfo(TypedDict):
    """A session; `bytes` counts all kept versions, the other sizes and the digest are the newest one's."""

    id: str
    object: Literal["session"]
    version: int
    model: str
    tokens: int
    learned_tokens: int
    bytes: int
    digest: str
    versions: int
    snapshots: int
    created: float
    updated: float
    used: float


class Snapshot(TypedDict):
    """A version kept until the snapshot is deleted."""

    snapshot: str
    version: int
    label: str
    created: float


class LevelPart(TypedDict):
    """What one level holds in one place of the model."""

    name: str
    norm: float
    change: float | None


class Level(TypedDict):
    """One memory level: its size, the norm of what it holds, how far that is from the version before, and its clock.

    A level that changes with every token has no clock; `change` is null where the version before is not known.
    """

    level: str
    tensors: int
    bytes: int
    norm: float
    change: float | None
    parts: list[LevelPart]
    chunk: int | None
    optimizer: str | None
    rank: int | None
    max_norm: float | None
    updates: int | None
    updates_refused: int | None
    tokens_since_update: int | None


class SessionPage(TypedDict):
    """Sessions by id; `next` is the cursor of the next page, null at the end."""

    object: Literal["list"]
    data: list[SessionInfo]
    next: str | None


class SnapshotList(TypedDict):
    """Snapshots, oldest first."""

    object: Literal["list"]
    data: list[Snapshot]


class VersionList(TypedDict):
    """Kept versions, newest first."""

    object: Literal["list"]
    data: list[SessionVersion]


class LevelList(TypedDict):
    """The levels of a version."""

    object: Literal["list"]
    version: int
    tokens: int
    data: list[Level]


class Learned(TypedDict):
    """Text was read without an answer."""

    id: str
    tokens_read: int
    session: SessionRef


class SessionDeleted(TypedDict):
    """The session is erased."""

    id: str
    object: Literal["session.deleted"]
    deleted: Literal[True]


class SnapshotDeleted(TypedDict):
    """The snapshot is given up."""

    snapshot: str
    deleted: Literal[True]


class ModelCard(TypedDict):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    fingerprint: str


class ModelList(TypedDict):
    """The models of this server."""

    object: Literal["list"]
    data: list[ModelCard]


class Turned(TypedDict):
    """OpenAI's answer, beside `session` when the request named one."""

    session: NotRequired[SessionRef]


BODIES: dict[tuple[str, str], Any] = {
    ("/v1/sessions", "get"): SessionPage,
    ("/v1/sessions", "post"): WrittenVersion,
    ("/v1/sessions/{id}", "get"): SessionInfo,
    ("/v1/sessions/{id}", "delete"): SessionDeleted,
    ("/v1/sessions/{id}/reset", "post"): WrittenVersion,
    ("/v1/sessions/{id}/snapshot", "post"): Snapshot,
    ("/v1/sessions/{id}/snapshots", "get"): SnapshotList,
    ("/v1/sessions/{id}/snapshots/{snapshot}", "delete"): SnapshotDeleted,
    ("/v1/sessions/{id}/restore", "post"): WrittenVersion,
    ("/v1/sessions/{id}/fork", "post"): WrittenVersion,
    ("/v1/sessions/{id}/learn", "post"): Learned,
    ("/v1/sessions/{id}/consolidate", "post"): Consolidated,
    ("/v1/sessions/{id}/history", "get"): VersionList,
    ("/v1/sessions/{id}/levels", "get"): LevelList,
    ("/v1/sessions/{id}/import", "put"): WrittenVersion,
    ("/v1/models", "get"): ModelList,
    ("/v1/models/{id}", "get"): ModelCard,
    ("/v1/chat/completions", "post"): Turned,
    ("/v1/completions", "post"): Turned,
    ("/v1/responses", "post"): Turned,
}
"""Operation (path, method) -> its answer."""


def schemas() -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, Any]]:
    """The JSON schema of each operation's answer, and the components that these refer to."""
    mode: Literal["serialization"] = "serialization"
    made, components = TypeAdapter.json_schemas(
        [(operation, mode, TypeAdapter(body)) for operation, body in BODIES.items()],
        ref_template="#/components/schemas/{model}",
    )
    return {key: schema for (key, _), schema in made.items()}, components.get("$defs", {})
