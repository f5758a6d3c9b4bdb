"""One SQLite file: is it ours, its schema and migrations, connections and transactions."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nested_runtime.errors import StoreError, StoreFormatError, StoreUnavailable

__all__ = ["SCHEMA_VERSION", "connect", "prepare", "transaction", "translated"]

APPLICATION_ID = 0x4E525354  # "NRST"
_MAGIC = b"SQLite format 3\0"

# One entry per schema version: the statements that lead to it from the one before. Never edit a released entry.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE sessions (
            id INTEGER PRIMARY KEY,
            tenant TEXT NOT NULL,
            session TEXT NOT NULL,
            head INTEGER NOT NULL,
            created REAL NOT NULL,
            updated REAL NOT NULL,
            used REAL NOT NULL,
            UNIQUE (tenant, session)
        )""",
        "CREATE INDEX sessions_used ON sessions (tenant, used)",
        # The blob comes last: reading the columns before it does not touch its pages.
        """CREATE TABLE versions (
            id INTEGER PRIMARY KEY,
            sid INTEGER NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
            number INTEGER NOT NULL,
            size INTEGER NOT NULL,
            record TEXT NOT NULL,
            state BLOB NOT NULL,
            UNIQUE (sid, number)
        )""",
        """CREATE TABLE snapshots (
            sid INTEGER NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
            id TEXT NOT NULL,
            number INTEGER NOT NULL,
            label TEXT NOT NULL,
            created REAL NOT NULL,
            PRIMARY KEY (sid, id)
        ) WITHOUT ROWID""",
        """CREATE TABLE answers (
            id INTEGER PRIMARY KEY,
            sid INTEGER NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
            name TEXT NOT NULL,
            body_digest TEXT NOT NULL,
            number INTEGER NOT NULL,
            expires REAL NOT NULL,
            answer BLOB NOT NULL,
            UNIQUE (sid, name)
        )""",
        # AUTOINCREMENT never gives a number twice: fences grow across deletion without leaving a trace of the session.
        """CREATE TABLE leases (
            fence INTEGER PRIMARY KEY AUTOINCREMENT,
            tenant TEXT NOT NULL,
            session TEXT NOT NULL,
            expires REAL NOT NULL,
            UNIQUE (tenant, session)
        )""",
    ),
)
SCHEMA_VERSION = len(MIGRATIONS)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StoreUnavailable(
            f"session store {path} cannot be used now: {error}; check the disk and other processes"
        ) from error
    except sqlite3.Error as error:
        raise StoreError(f"session store {path} failed: {error}; run `nested admin fsck`") from error


def connect(path: Path, timeout: float) -> sqlite3.Connection:
    """A connection whose commits are on disk when they return. Transactions are explicit."""
    connection = sqlite3.connect(path, timeout=timeout, isolation_level=None)
    connection.execute("PRAGMA page_size = 16384")  # of a new file: half the work per MB of 4096
    connection.execute("PRAGMA wal_autocheckpoint = 1024")  # pages
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")  # erased memories are overwritten; replaced ones reuse their pages
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection, begin: str) -> Iterator[sqlite3.Connection]:
    """`begin` ("BEGIN IMMEDIATE" to write, "BEGIN" to read), then commit, or roll back on any exception."""
    connection.execute(begin)
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def prepare(path: Path, timeout: float) -> None:
    """Create the file, or check that it is ours and migrate it. A file that is not ours is not touched."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with path.open("rb") as file:
            header = file.read(100)
    except OSError as error:
        raise StoreUnavailable(
            f"session store {path} cannot be opened: {error.strerror}; check path and rights"
        ) from error
    if header:
        _check_header(path, header)
    with translated(path):
        connection = connect(path, timeout)
        try:
            _migrate(path, connection)
            _use_wal(connection, timeout)
        finally:
            connection.close()


def _use_wal(connection: sqlite3.Connection, timeout: float) -> None:
    """Switch to the write-ahead log; SQLite's busy timeout does not cover it: while anybody reads it fails at once."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _check_header(path: Path, header: bytes) -> None:
    if header[:16] != _MAGIC:
        raise StoreFormatError(f"{path} begins with {header[:16]!r}: it is not a SQLite file; choose another path")
    application = int.from_bytes(header[68:72], "big")
    if application != APPLICATION_ID:
        raise StoreFormatError(
            f"{path} is a SQLite file of another application (id {application:#x}, ours is {APPLICATION_ID:#x}); "
            "choose another path"
        )


def _migrate(path: Path, connection: sqlite3.Connection) -> None:
    with transaction(connection, "BEGIN IMMEDIATE"):
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreFormatError(
                f"{path} has schema version {version}, this release knows up to {SCHEMA_VERSION}; use a newer release"
            )
        for step in MIGRATIONS[version:]:
            for statement in step:
                connection.execute(statement)
        if version < SCHEMA_VERSION:  # in the same transaction: a crash leaves the old version or the new one
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
