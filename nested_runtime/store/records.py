"""What a store keeps, as frozen records: keys, versions, leases, answers, snapshots, limits."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nested_runtime.errors import ConfigError, RequestError, StoreError

__all__ = [
    "Draft",
    "Lease",
    "Limits",
    "Page",
    "SessionInfo",
    "SessionKey",
    "Snapshot",
    "StoredAnswer",
    "Usage",
    "Version",
    "check_text",
]

MAX_TEXT = 256


def check_text(value: object, param: str) -> None:
    """Refuse what is not a string of 1 to 256 characters without control characters (or cannot be written as UTF-8)."""
    if not isinstance(value, str):
        raise RequestError(f"{param} is a {type(value).__name__}; send a string", param=param)
    if not 1 <= len(value) <= MAX_TEXT:
        raise RequestError(f"{param} has {len(value)} characters; send 1 to {MAX_TEXT}", param=param)
    for position, char in enumerate(value):
        if unicodedata.category(char) in ("Cc", "Cs"):
            raise RequestError(
                f"{param} has the control character {char!r} at position {position}; remove it", param=param
            )


@dataclass(frozen=True, order=True)
class SessionKey:
    """Whose session. Both parts are arbitrary text; ordered by (tenant, session)."""

    tenant: str
    session: str

    def __post_init__(self) -> None:
        check_text(self.tenant, "tenant")
        check_text(self.session, "session_id")


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a committer says about a version; the store adds number, parent, size and time.

    kind            "turn", "learn", "create", "reset", "restore", "fork" or "import"
    tokens          session tokens absorbed by the state
    digest          of the uncompressed state
    fingerprint     of the model whose state this is; `model` is the name it was served under
    pending         last sampled token, not in the state: read first in the next turn (None if none)
    chain, root     digests after the last and after the first message of the open conversation; `messages` counts them
    learned_tokens  tokens the memory has learned from since the session began
    source          version of this session whose content this one continues, when that is not the parent
                    (restore, regenerated answer)
    extra           small JSON object, such as statistics per level
    """

    kind: str
    tokens: int
    digest: str
    fingerprint: str
    model: str = ""
    pending: int | None = None
    chain: str = ""
    messages: int = 0
    root: str = ""
    learned_tokens: int = 0
    source: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Version(Draft):
    """One immutable version of a session; the newest is the head.

    number   1, 2, 3, ... without gaps
    parent   the head it was committed on (None for the first)
    size     bytes at rest
    created  seconds since the epoch
    """

    number: int
    parent: int | None
    size: int
    created: float

    def to_json(self) -> str:
        """One compact JSON object."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Version:
        """Inverse of `to_json`; StoreError if it is damaged."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise StoreError(f"version record {text[:80]!r} is damaged: {error}; run `nested admin fsck`") from error


@dataclass(frozen=True)
class Lease:
    """The exclusive right to commit to a session until `expires` (store's clock). `fence` grows with every lease."""

    key: SessionKey
    fence: int
    ttl: float
    expires: float


@dataclass(frozen=True)
class StoredAnswer:
    """Idempotency record: the answer to the request with this key, kept for `answer_ttl`. The store sets `version`."""

    key: str
    body_digest: str
    answer: bytes
    version: int = 0

    def __post_init__(self) -> None:
        check_text(self.key, "Idempotency-Key")


@dataclass(frozen=True)
class Snapshot:
    """A named version that is kept until the snapshot is deleted."""

    id: str
    version: int
    label: str
    created: float


@dataclass(frozen=True)
class SessionInfo:
    """A session from outside. `used` is the last lease or commit, `bytes` and `versions` count all kept versions."""

    key: SessionKey
    head: Version
    created: float
    updated: float
    used: float
    versions: int
    snapshots: int
    bytes: int


@dataclass(frozen=True)
class Page:
    """Some sessions in key order; `cursor` continues after them, None = no more."""

    sessions: tuple[SessionInfo, ...]
    cursor: str | None


@dataclass(frozen=True)
class Usage:
    """What a tenant (or everybody) holds."""

    sessions: int
    versions: int
    snapshots: int
    bytes: int


@dataclass(frozen=True)
class Limits:
    """Bounds of what is stored.

    state_bytes  of one uncompressed state; `bytes_per_session` counts all kept versions at rest
    answer_bytes of one idempotency record
    retain       newest versions kept; older ones stay while a snapshot points at them
    """

    sessions_per_tenant: int = 100_000
    bytes_per_session: int = 512 << 20
    state_bytes: int = 64 << 20
    snapshots_per_session: int = 32
    answers_per_session: int = 256
    answer_bytes: int = 4 << 20
    retain: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"store limit {name} is {value!r}; give a whole number of at least 1")
