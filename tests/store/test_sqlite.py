"""What is particular to SQLite: whose file it is, what erasure leaves, damage."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from nested_runtime.errors import NestedError, StateError, StoreError, StoreFormatError, StoreUnavailable
from nested_runtime.store import sqlite_file
from nested_runtime.store.base import SessionKey, StateStore
from nested_runtime.store.sqlite_file import SCHEMA_VERSION, prepare
from nested_runtime.store.url import open_store

KEY = SessionKey("acme", "alice")


def open_once(path: Path) -> None:
    async def main() -> None:
        async with open_store(f"sqlite://{path}"):
            pass

    asyncio.run(main())


def other_application(path: Path, application_id: int = 0) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(
        f"PRAGMA application_id = {application_id}; CREATE TABLE photos (id); PRAGMA user_version = 7"
    )
    connection.close()


@pytest.mark.parametrize("kind", ["text", "sqlite", "application", "short", "newer"])
def test_a_file_that_is_not_ours_is_refused_untouched(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "text":
        path.write_text("Dear diary, " * 1000)
    elif kind == "short":
        path.write_bytes(b"SQLite")
    elif kind == "newer":
        other_application(path, 0x4E525354)
    else:
        other_application(path, 0 if kind == "sqlite" else 0x0F055112)
    before = path.read_bytes()
    with pytest.raises(StoreFormatError, match=str(path)):
        open_once(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


def test_an_older_file_is_migrated_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    prepare(path, 1.0)
    steps = sqlite_file.MIGRATIONS
    assert len(steps) == SCHEMA_VERSION

    def release(*newer: tuple[str, ...]) -> None:
        monkeypatch.setattr(sqlite_file, "MIGRATIONS", (*steps, *newer))
        monkeypatch.setattr(sqlite_file, "SCHEMA_VERSION", len(steps) + len(newer))

    def version() -> tuple[int, int]:
        with closing(sqlite3.connect(path)) as connection:
            tables = connection.execute("SELECT count(*) FROM sqlite_schema WHERE name IN ('one', 'two')").fetchone()
            return connection.execute("PRAGMA user_version").fetchone()[0], tables[0]

    release(("CREATE TABLE one (id)",), ("CREATE TABLE two (id)", "CREATE TABLE two (id)"))
    with pytest.raises(StoreUnavailable, match="already exists"):
        prepare(path, 1.0)
    assert version() == (SCHEMA_VERSION, 0)
    release(("CREATE TABLE one (id)",), ("CREATE TABLE two (id)",))
    for _ in range(2):
        prepare(path, 1.0)
        assert version() == (SCHEMA_VERSION + 2, 2)
    monkeypatch.undo()
    with pytest.raises(StoreFormatError, match="newer release"):
        open_once(path)


def test_the_log_waits_for_readers(tmp_path: Path) -> None:
    """The switch to a write-ahead log needs the file alone: it waits for a reader, but not for ever."""
    path = tmp_path / "file"
    prepare(path, 1.0)
    reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    reader.execute("PRAGMA journal_mode = DELETE")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM sessions").fetchall()
    with pytest.raises(StoreUnavailable, match="locked"):
        prepare(path, 0.05)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(prepare, path, 60.0)
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        reader.execute("COMMIT")
        waiting.result()
    reader.execute("SELECT * FROM sessions").fetchall()  # looks at the file again
    assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    reader.close()


def test_paths(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "ü %41.sqlite"
    asyncio.run(open_store(f"sqlite://{str(path).replace('%', '%25').replace(' ', '%20')}").open())
    assert path.exists()
    assert path.stat().st_mode & 0o777 == 0o600
    open_once(path)
    (tmp_path / "plain").write_text("")
    with pytest.raises(StoreUnavailable, match="plain/x"):
        open_once(tmp_path / "plain" / "x")
    with pytest.raises(StoreUnavailable, match=str(tmp_path)):
        open_once(tmp_path)


def files(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.iterdir() if file.name.startswith(path.name))


def test_erased_bytes_are_gone_from_the_files(tmp_path: Path, clock: Any) -> None:
    """Versions, answers, session names: none of them can be read from the file or its log afterwards."""
    from nested_runtime.store.base import Draft, StoredAnswer

    path = tmp_path / "s.sqlite"
    secrets = [b"state of alice", b"answer to alice", b"label of alice", b"the session of alice"]
    key = SessionKey("acme", "the session of alice")
    plain = bytes(byte for byte in secrets[0] for _ in range(4))

    async def main() -> None:
        async with open_store(f"sqlite://{path}") as store:
            draft = Draft(kind="turn", tokens=1, digest="d", fingerprint="f")
            for owner in (KEY, key):
                async with store.hold(owner) as lease:
                    for number in range(12):
                        # A store keeps every fourth byte together: repeated, the secret can be read.
                        state = plain + os.urandom(9_000) if owner == key else os.urandom(9_000)
                        answer = StoredAnswer(f"k{number}", "b", secrets[1]) if owner == key else None
                        await store.commit(lease, number, state, draft, answer)
            await store.snapshot(key, label=secrets[2].decode())
            assert all(secret in files(path) for secret in secrets)
            assert await store.delete(key)
            assert not any(secret in files(path) for secret in secrets)
            assert len(await store.versions(KEY)) == 8

    asyncio.run(main())


def test_damage_is_found_and_contained(bench_sqlite: Any) -> None:
    path = Path(bench_sqlite.url.removeprefix("sqlite://"))

    async def main(store: StateStore) -> None:
        async with store.hold(KEY) as lease:
            for number in range(3):
                await bench_sqlite.commit(store, lease, number, b"%d" % number * 1000)
        other = sqlite3.connect(path)
        other.execute("UPDATE versions SET state = zeroblob(length(state)) WHERE number = 2")
        other.execute("UPDATE versions SET state = (SELECT state FROM versions WHERE number = 1) WHERE number = 3")
        other.commit()
        with pytest.raises(StateError):
            await store.load(KEY, 2)
        with pytest.raises(StateError, match="of another session"):
            await store.load(KEY)
        assert (await store.load(KEY, 1))[1] == b"0" * 1000
        assert len(await store.fsck()) == 2
        other.execute("DELETE FROM versions WHERE number = 3")
        other.commit()
        other.close()
        assert any("head 3 is not its newest version" in problem for problem in await store.fsck())

    async def run() -> None:
        async with bench_sqlite.open() as store:
            await main(store)

    asyncio.run(run())


def test_a_locked_file_is_unavailable_not_broken(bench_sqlite: Any) -> None:
    path = Path(bench_sqlite.url.removeprefix("sqlite://"))

    async def main() -> None:
        async with bench_sqlite.open(timeout=0.05) as store:
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreUnavailable, match="locked"):
                await store.lease(KEY)
            assert await store.head(KEY) is None  # reading goes on
            other.execute("ROLLBACK")
            other.close()
            await store.release(await store.lease(KEY))

    asyncio.run(main())


def test_a_damaged_record_is_an_error_of_ours(bench_sqlite: Any) -> None:
    path = Path(bench_sqlite.url.removeprefix("sqlite://"))

    async def main() -> None:
        async with bench_sqlite.open() as store:
            async with store.hold(KEY) as lease:
                await bench_sqlite.commit(store, lease, 0, b"state")
            other = sqlite3.connect(path)
            other.execute("UPDATE versions SET record = '{\"kind\": 1}'")
            other.commit()
            other.close()
            for call in (store.head(KEY), store.load(KEY), store.sessions()):
                with pytest.raises(StoreError, match="damaged"):
                    await call
            assert "stopped early" in (await store.fsck())[-1]

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(8))
def test_a_file_with_holes_never_crashes(bench_sqlite: Any, seed: int) -> None:
    """Pages overwritten at random, or the end cut off: errors of ours, or the right bytes."""
    path = Path(bench_sqlite.url.removeprefix("sqlite://"))
    luck = random.Random(seed)

    async def write() -> None:
        async with bench_sqlite.open() as store, store.hold(KEY) as lease:
            for number in range(6):
                await bench_sqlite.commit(store, lease, number, bytes([number]) * 100 + luck.randbytes(50_000))

    async def read() -> None:
        async with bench_sqlite.open() as store:
            for number in range(1, 7):
                _, state = await store.load(KEY, number)
                assert state[:100] == bytes([number - 1]) * 100

    asyncio.run(write())
    content = bytearray(path.read_bytes())
    if seed % 4 == 0:
        del content[luck.randrange(1, len(content)) :]
    for _ in range(6):
        start = luck.randrange(100, max(len(content), 101))
        content[start : start + 300] = luck.randbytes(len(content[start : start + 300]))
    path.write_bytes(content)
    with suppress(NestedError):
        asyncio.run(read())
