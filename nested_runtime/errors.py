"""The exceptions of Nested Runtime.

    NestedError
    |-- ConfigError              a configuration field, option or environment value is impossible
    |   `-- CheckpointError      a model folder is missing something, has too much, or does not fit
    |-- RequestError             the caller's request is wrong; `param` names the field
    |   `-- ContextOverflow      more prompt tokens than the model or server accepts
    |-- NotFound                 model, session, version or snapshot does not exist (or is another tenant's)
    |-- Conflict                 the session moved on: busy, stale version, lost lease, history
    |   |-- SessionBusy
    |   |-- VersionConflict
    |   |-- LeaseLost
    |   `-- HistoryConflict
    |-- StateError               a state blob is refused
    |   `-- StateMismatch        ... because it belongs to another model, session or version
    |-- UpdateDiverged           an inner update produced a non-finite state; the turn failed alone
    |-- Overloaded               a queue or capacity limit is reached; retry later
    `-- StoreError               the store
        |-- StoreUnavailable     cannot be reached now; retry later
        `-- StoreFormatError     the file or database is not ours, or of another schema version

Every message says what is wrong, the offending value and the remedy. `code` is stable and machine-readable: it is the
`error.code` of the HTTP answer.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Conflict",
    "ContextOverflow",
    "HistoryConflict",
    "LeaseLost",
    "NestedError",
    "NotFound",
    "Overloaded",
    "RequestError",
    "SessionBusy",
    "StateError",
    "StateMismatch",
    "StoreError",
    "StoreFormatError",
    "StoreUnavailable",
    "UpdateDiverged",
    "VersionConflict",
]


class NestedError(Exception):
    """Base of all errors this package raises on purpose."""

    code = "internal_error"


class ConfigError(NestedError):
    """A configuration value is impossible; the message names the field."""

    code = "invalid_config"


class CheckpointError(ConfigError):
    """A checkpoint folder cannot be loaded; the message names the file and the tensors."""

    code = "invalid_checkpoint"


class RequestError(NestedError):
    """The request is wrong. `param` is the path of the field, as OpenAI's errors name it."""

    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class ContextOverflow(RequestError):
    """The prompt, or prompt + max_tokens, is over a limit."""

    code = "context_length_exceeded"


class NotFound(NestedError):
    """The named thing does not exist for this caller."""

    code = "not_found"


class Conflict(NestedError):
    """The request conflicts with the session's present state."""

    code = "conflict"


class SessionBusy(Conflict):
    """Another turn holds the session and the queue for it is full or the wait was too long."""

    code = "session_busy"


class VersionConflict(Conflict):
    """The expected version (If-Match, parent of a commit) is not the session's present version."""

    code = "version_conflict"


class LeaseLost(Conflict):
    """The lease expired or was taken over: this holder may no longer commit."""

    code = "lease_lost"


class HistoryConflict(Conflict):
    """The conversation sent forks from a version that is no longer kept."""

    code = "history_conflict"


class StateError(NestedError):
    """A state blob is malformed, hostile or damaged; nothing of it was loaded."""

    code = "invalid_state"


class StateMismatch(StateError):
    """A well-formed state blob of another model, session or version."""

    code = "state_mismatch"


class UpdateDiverged(NestedError):
    """A memory update became non-finite or left its norm bound; the session keeps its old version."""

    code = "update_diverged"


class Overloaded(NestedError):
    """A capacity limit is reached. `retry_after` is in seconds."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoreError(NestedError):
    """The session store failed."""

    code = "store_error"


class StoreUnavailable(StoreError):
    """The store cannot be reached at the moment."""

    code = "store_unavailable"


class StoreFormatError(StoreError):
    """The store's file or database is not ours, or of a schema version this release does not know."""

    code = "store_format"
