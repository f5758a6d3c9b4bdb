"""API keys: a file of keys and tenants, kept as SHA-256 hashes, compared in constant time.

One key per line: `tenant key` or `tenant sha256:<64 hex digits>`; a lone key belongs to the tenant "default". Empty
lines and lines that begin with # are skipped.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from nested_runtime.errors import ConfigError

__all__ = ["DEFAULT_TENANT", "Keys", "bearer"]

DEFAULT_TENANT = "default"
MIN_KEY = 8


@dataclass(frozen=True)
class Keys:
    """(sha256 of key, tenant) pairs. Empty = no key is asked for."""

    entries: tuple[tuple[bytes, str], ...] = ()

    @classmethod
    def load(cls, path: Path | None) -> Keys:
        """Read a key file; ConfigError names the line that is wrong."""
        if path is None:
            return cls()
        try:
            lines = path.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"key file {path} cannot be read: {error}") from None
        entries = tuple(
            _entry(path, number, line.split())
            for number, line in enumerate(lines, 1)
            if line.strip() and not line.lstrip().startswith("#")
        )
        if not entries:
            raise ConfigError(f"key file {path} has no keys; write one `tenant key` per line")
        if len({digest for digest, _ in entries}) != len(entries):
            raise ConfigError(f"key file {path} has the same key twice; every key belongs to one tenant")
        return cls(entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def tenant(self, key: str | None) -> str | None:
        """Whose key it is, or None. Looks at every entry, so the time taken says nothing."""
        digest = hashlib.sha256((key or "").encode("utf-8", "surrogatepass")).digest()
        found: str | None = None
        for known, tenant in self.entries:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found if key else None


def _entry(path: Path, number: int, words: list[str]) -> tuple[bytes, str]:
    where = f"key file {path}, line {number}"
    if len(words) > 2:
        raise ConfigError(f"{where}: {len(words)} words; write `tenant key`")
    tenant, key = words if len(words) == 2 else (DEFAULT_TENANT, words[0])
    if not key.startswith("sha256:"):
        if len(key) < MIN_KEY:
            raise ConfigError(f"{where}: the key has {len(key)} characters; use at least {MIN_KEY}")
        return hashlib.sha256(key.encode()).digest(), tenant
    try:
        digest = bytes.fromhex(key.removeprefix("sha256:"))
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ConfigError(f"{where}: sha256: must be followed by 64 hex digits")
    return digest, tenant


def bearer(headers: dict[bytes, bytes]) -> str | None:
    """The key of a request: `Authorization: Bearer <key>`, or `X-API-Key`."""
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip() or None
