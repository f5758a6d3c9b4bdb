"""What is particular to Redis: durability in force, bad networks, cancellation, keys, the index."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nested_runtime.errors import ConfigError, LeaseLost, SessionBusy, StoreFormatError, StoreUnavailable
from nested_runtime.store.base import Draft, SessionKey, StateStore, StoredAnswer
from nested_runtime.store.redis import RedisStore
from nested_runtime.store.url import open_store

pytestmark = pytest.mark.redis
KEY = SessionKey("acme", "alice")
DRAFT = Draft(kind="turn", tokens=0, digest="", fingerprint="fp")


async def command(store: StateStore, *args: str | int) -> Any:
    assert isinstance(store, RedisStore)
    return await store._link.command(*args)


async def names(store: StateStore) -> set[str]:
    assert isinstance(store, RedisStore)
    return {name.decode() for name in await command(store, "KEYS", f"{store._keys.prefix}:*")}


def test_tls_and_a_password(start_redis: Callable[..., Any], tmp_path: Path) -> None:
    """rediss:// checks the certificate; a wrong password or an unknown certificate is an error without the password."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    kind = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    subject = ("-subj", "/CN=nested", "-addext", "subjectAltName=IP:127.0.0.1")
    command = [openssl, *kind, *subject, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    tls = ("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key))
    start_redis(*tls, "--tls-auth-clients", "no", "--requirepass", "open-sesame", answer=b"-NOAUTH")
    place = f"127.0.0.1:{port}/0?ssl_ca_certs="

    async def main() -> None:
        async with open_store(f"rediss://:open-sesame@{place}{certificate}") as store:
            async with store.hold(KEY) as lease:
                await store.commit(lease, 0, b"state", DRAFT)
            assert (await store.load(KEY))[1] == b"state"
        for url in (f"rediss://:guess@{place}{certificate}", f"rediss://:open-sesame@{place}"):
            with pytest.raises(StoreUnavailable, match=str(port)) as refused:
                await open_store(url).open()
            assert "open-sesame" not in str(refused.value)
            assert "guess" not in str(refused.value)

    asyncio.run(main())


# ---- durability -----------------------------------------------------------------------------------------------------


def test_durability_in_force(start_redis: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    always = start_redis("--appendonly", "yes", "--appendfsync", "always")
    plain = start_redis("--maxmemory-policy", "allkeys-lru", "--maxmemory", "100mb")
    follower = start_redis()

    async def main() -> None:
        async with open_store(always.url) as store:
            assert store.durability == "fsynced"
            await command(store, "CONFIG", "SET", "appendfsync", "everysec")
            await store.ping()
            assert store.durability == "memory"  # 7.0 has no WAITAOF, and there is no replica
        assert not caplog.records
        async with open_store(plain.url) as store:
            assert store.durability == "memory"
            assert "allkeys-lru" in caplog.text
            follower.send(f"REPLICAOF 127.0.0.1 {plain.port}")
            deadline = time.monotonic() + 20
            while store.durability != "acked":
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
                await store.ping()
            async with store.hold(KEY) as lease:
                await store.commit(lease, 0, b"1", DRAFT)
                follower.kill()
                await store.commit(lease, 1, b"2", DRAFT)
            assert store.durability == "memory"
            assert "commits are not acked now" in caplog.text
        async with open_store(plain.url + "?wait=0") as store:
            assert store.durability == "memory"

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())


def test_killed_and_restarted_server(start_redis: Callable[..., Any]) -> None:
    server = start_redis("--appendonly", "yes", "--appendfsync", "always")

    async def main() -> None:
        async with open_store(server.url) as store:
            for number in range(4):
                async with store.hold(KEY) as lease:
                    await store.commit(lease, number, b"%d" % (number + 1), DRAFT)
                server.kill()
                for call in (store.ping(), store.head(KEY), store.lease(KEY), store.load(KEY), store.sessions()):
                    with pytest.raises(StoreUnavailable):
                        await call
                server.start()
                version, state = await store.load(KEY)
                assert (version.number, state) == (number + 1, b"%d" % (number + 1))
            assert await store.fsck() == []

    asyncio.run(main())


def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port}") as refused:
        asyncio.run(open_store(f"redis://user:secret@127.0.0.1:{port}/0").open())
    assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match="impossible"):
        asyncio.run(open_store(f"redis://127.0.0.1:{port}/0?socket_timeout=soon").open())


# ---- keys and index -------------------------------------------------------------------------------------------------


def test_another_schema_is_refused(bench_redis: Any) -> None:
    async def main() -> None:
        async with bench_redis.open() as store:
            await command(store, "SET", store._keys.schema, "2")
        with pytest.raises(StoreFormatError, match="schema = b'2'"):
            await bench_redis.open().open()
        async with open_store(bench_redis.url + "x") as store:
            await command(store, "DEL", store._keys.schema)
            await command(store, "LPUSH", store._keys.schema, "2")
        with pytest.raises(StoreFormatError):
            await open_store(bench_redis.url + "x").open()

    asyncio.run(main())


def test_deletion_leaves_no_key(bench_redis: Any) -> None:
    async def main() -> None:
        async with bench_redis.open() as store:
            for _ in range(2):
                lease = await store.lease(KEY)
                for number in range(12):
                    await store.commit(lease, number, b"x", DRAFT, StoredAnswer(f"k{number}", "b", b"a"))
                    await store.snapshot(KEY)
                assert len(await names(store)) > 12
                await store.delete(KEY)
                assert await names(store) == {store._keys.schema, store._keys.tenants}
            await store.release(await store.lease(KEY))
            left = await names(store)
            assert left == {store._keys.schema, store._keys.tenants, store._keys.session(KEY) + ":l"}
            assert 0 < await command(store, "PTTL", store._keys.session(KEY) + ":l") < 3_700_000
            with pytest.raises(LeaseLost):
                await store.commit(lease, 12, b"x", DRAFT)
            for name in await names(store):  # what was staged in vain goes by itself
                if ":staged:" in name:
                    assert 0 < await command(store, "TTL", name) <= 60

    asyncio.run(main())


def test_index_heals(bench_redis: Any) -> None:
    """An entry without a session is skipped, and removed once it is old; a session without an entry is found."""

    async def main() -> None:
        async with bench_redis.open(limits=None) as store:
            for key in (KEY, SessionKey("acme", "bob")):
                async with store.hold(key) as lease:
                    await store.commit(lease, 0, b"x", DRAFT)
            ghost = SessionKey("acme", "bert")
            await store._reserve(ghost)
            assert len((await store.sessions("acme", limit=2)).sessions) == 2
            assert await store.sweep() == 0
            assert await store._stamp(ghost)
            bench_redis.clock.pass_(3_601)
            assert await store.sweep() == 0
            assert await store._stamp(ghost) is None
            assert await store.fsck() == []
            await command(store, "HDEL", store._keys.index("acme")[1], "bob")
            assert await store.fsck() == ["'acme'/'bob': is not in its tenant's index"]

    asyncio.run(main())


def test_server_time_and_lost_replies(bench_redis: Any) -> None:
    """Without an injected clock the server's counts; a call that is sent again has no second effect."""

    async def main() -> None:
        async with open_store(bench_redis.url) as store:
            late = await store.lease(KEY, ttl=0.05)
            assert abs(late.expires - time.time() - 0.05) < 5
            lease = await store.lease(KEY, ttl=30, wait=5)
            with pytest.raises(LeaseLost):
                await store.commit(late, 0, b"x", DRAFT)
            version = await store.commit(lease, 0, b"x", DRAFT)
            commit_id = (await command(store, "HGET", store._keys.session(KEY), "commit")).decode()
            from nested_runtime.store import redis_scripts

            keys = [*store._keys.all(KEY), "gone"]
            args = ("", 0, lease.fence, 0, version.to_json(), commit_id, 8, 10**9, "", "", 60, 8)
            assert await store._link.eval(redis_scripts.COMMIT, keys, *args) == [b"ok"]
            assert (await store.head(KEY)) == version

    asyncio.run(main())


# ---- bad networks ---------------------------------------------------------------------------------------------------


class BadNetwork:
    """A proxy that delays, splits and cuts what the server answers."""

    def __init__(self, port: int, cut: float, seed: int) -> None:
        self.luck = random.Random(seed)
        self.port, self.cut, self.cuts = port, cut, 0
        self.tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> str:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/0"

    async def __aexit__(self, *exc: object) -> None:
        self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        tasks = [
            asyncio.create_task(self.pipe(reader, back, False)),
            asyncio.create_task(self.pipe(there, writer, True)),
        ]
        self.tasks.update(tasks)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for end in (back, writer):
            end.transport.abort()
        for task in tasks:
            task.cancel()
        self.tasks.difference_update(tasks)

    async def pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool) -> None:
        while data := await reader.read(1 << 16):
            if answers:
                await asyncio.sleep(self.luck.choice([0, 0, 0.001, 0.005]))
                if self.luck.random() < self.cut:
                    self.cuts += 1
                    writer.write(data[: self.luck.randrange(len(data) + 1)])
                    await asyncio.sleep(0.001)
                    return
            writer.write(data)
            await writer.drain()


def test_no_reply_reaches_another_caller(redis_server: Any) -> None:
    """Eight users, a network that cuts replies and clients that give up: nobody ever sees a state of somebody else.

    Whoever saw a version committed finds it, and a retried commit counts once.
    """

    async def user(store: StateStore, name: str, luck: random.Random, tally: dict[str, int]) -> None:
        key, committed = SessionKey("acme", name), 0
        for _ in range(25):

            async def turn(committed: int = committed) -> int:
                async with store.hold(key, ttl=2, wait=10) as lease:
                    head = await store.head(key)
                    number = head.number if head else 0
                    assert number >= committed
                    if head is not None:
                        assert head.fingerprint == name
                        version, state = await store.load(key)
                        assert state == name.encode() * 3000 + b"%d" % number
                        assert version == head
                    draft = Draft(kind="turn", tokens=0, digest="", fingerprint=name)
                    return (
                        await store.commit(lease, number, name.encode() * 3000 + b"%d" % (number + 1), draft)
                    ).number

            task = asyncio.create_task(turn())
            if luck.random() < 0.3:
                await asyncio.sleep(luck.uniform(0, 0.03))
                task.cancel()
            try:
                number = await task
            except asyncio.CancelledError:
                tally["cancelled"] += 1
            except (StoreUnavailable, LeaseLost, SessionBusy):
                tally["failed"] += 1
            else:
                assert number > committed
                committed = number
                tally["committed"] += 1
        head = await store.head(key)
        assert (head.number if head else 0) >= committed

    async def main() -> None:
        network = BadNetwork(redis_server.port, cut=0.02, seed=3)
        tally = dict.fromkeys(("committed", "cancelled", "failed"), 0)
        async with network as url:
            store = open_store(url + "?prefix=bad", timeout=3.0)
            for _ in range(20):
                try:
                    await store.open()
                    break
                except StoreUnavailable:
                    continue
            await asyncio.gather(*(user(store, f"user{n}", random.Random(n), tally) for n in range(8)))
            await store.close()
        assert network.cuts > 10
        assert tally["committed"] > 80
        assert tally["cancelled"] > 10
        async with open_store(redis_server.url + "?prefix=bad") as store:
            assert await store.fsck() == []

    asyncio.run(main())
