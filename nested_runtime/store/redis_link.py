"""The connection to Redis: URL, keys, calls that cannot leak a reply to another caller, durability in force."""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError, ResponseError

from nested_runtime.errors import ConfigError, StoreFormatError, StoreUnavailable
from nested_runtime.store.records import SessionKey
from nested_runtime.store.turnstile import shielded

__all__ = ["Keys", "RedisLink"]

SCHEMA_VERSION = b"1"
WAIT_MS = 2_000  # with appendfsync everysec WAITAOF takes up to a second
_TRUE = ("1", "true", "yes")
log = logging.getLogger(__name__)


def _encode(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decode(text: str) -> str:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()


class Keys:
    """Key names. What is in braces picks the cluster slot: one per session, one per tenant for its index."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.schema = f"{prefix}:schema"
        self.tenants = f"{prefix}:tenants"

    def session(self, key: SessionKey) -> str:
        """The session's hash; its other keys begin with this name."""
        return f"{self.prefix}:{{{_encode(key.tenant)}.{_encode(key.session)}}}"

    def all(self, key: SessionKey) -> list[str]:
        """The six keys every session script gets."""
        name = self.session(key)
        return [name, *(f"{name}:{part}" for part in ("v", "n", "a", "x", "l"))]

    def index(self, tenant: str) -> list[str]:
        """Names of the tenant's sessions in order, and their reservation stamps."""
        name = f"{self.prefix}:{{{_encode(tenant)}}}"
        return [f"{name}:index", f"{name}:stamps"]

    def parse(self, name: str) -> SessionKey | None:
        """The session whose hash has this name; None for every other key."""
        tag = name.removeprefix(f"{self.prefix}:{{").removesuffix("}")
        if len(tag) + len(self.prefix) + 3 != len(name) or tag.count(".") != 1:
            return None
        tenant, session = tag.split(".")
        return SessionKey(_decode(tenant), _decode(session))


class RedisLink:
    """A client that raises StoreUnavailable for whatever goes wrong on the way.

    Query options of the URL: `cluster=1` for Redis Cluster, `prefix=` of all keys (default "nested"), `wait=0` never to
    wait for replicas or disk; the rest is redis-py's. Commands are sent again after a lost connection, so only
    idempotent ones may be used.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        self._cluster = options.pop("cluster", "0") in _TRUE
        self._may_wait = options.pop("wait", "1") in _TRUE and not self._cluster
        self.keys = Keys(options.pop("prefix", "nested"))
        self.name = f"{parts.scheme}://{parts.hostname}:{parts.port or 6379}{parts.path}"  # without the password
        if not parts.hostname or "{" in self.keys.prefix:
            raise ConfigError(f"store URL {self.name} is impossible; write redis://host:port/db")
        self._url = parts._replace(query=urlencode(options)).geturl()
        self._timeout = timeout
        self._client: Any = None  # redis-py's results are unions of the sync and the async kind
        self._warned: set[str] = set()
        self.durability = "memory"
        self._wait: tuple[str | int, ...] = ()

    async def open(self) -> None:
        """Connect, check the schema version, see how durable the server is."""
        # RESP 2: with RESP 3 redis-py keeps unread data in a pooled connection (it could be a push message)
        options: dict[str, Any] = {
            "socket_timeout": self._timeout,
            "socket_connect_timeout": self._timeout,
            "protocol": 2,
            "retry": Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
        }
        try:
            if self._cluster:
                self._client = aioredis.RedisCluster.from_url(self._url, **options)
            else:
                pool = aioredis.BlockingConnectionPool.from_url(self._url, max_connections=32, timeout=10, **options)
                self._client = aioredis.Redis.from_pool(pool)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"store URL {self.name} is impossible: {error}") from error
        try:
            await self.command("SET", self.keys.schema, SCHEMA_VERSION, "NX")
            found = await self.command("GET", self.keys.schema)
            if found != SCHEMA_VERSION:
                raise StoreFormatError(
                    f"{self.name} has {self.keys.schema} = {found!r}, this release knows {SCHEMA_VERSION!r}; use the "
                    "release that wrote it or another ?prefix="
                )
            await self.detect()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Disconnect."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _call(self, call: Awaitable[Any]) -> Any:
        async def run() -> Any:
            try:
                return await call
            except ResponseError as error:
                if str(error).startswith("WRONGTYPE"):
                    raise StoreFormatError(f"{self.name} has a key of ours with foreign content: {error}") from error
                raise StoreUnavailable(f"{self.name} refuses: {error}; see its log and memory limit") from error
            except (RedisError, OSError) as error:
                raise StoreUnavailable(f"{self.name} does not answer: {error}; is it running?") from error

        # Never cancelled between command and reply: a connection with an unread reply would answer the next caller.
        return await shielded(run())

    def _ready(self) -> Any:
        if self._client is None:
            raise StoreUnavailable(f"{self.name} is not open; call open() first")
        return self._client

    async def command(self, *args: str | bytes | float) -> Any:
        """One command."""
        return await self._call(self._ready().execute_command(*args))

    async def eval(self, script: str, keys: Sequence[str], *args: str | bytes | float) -> Any:
        """One script."""
        return await self._call(self._ready().eval(script, len(keys), *keys, *args))

    async def read(self, script: str, keys: Sequence[str], *args: str | bytes | float) -> Any:
        """A script's result and the content of the last key, atomically."""
        pipe = self._ready().pipeline(transaction=True)
        pipe.eval(script, len(keys), *keys, *args)
        pipe.get(keys[-1])
        return await self._call(pipe.execute())

    async def commit(self, script: str, keys: Sequence[str], state: bytes, *args: str | bytes | float) -> Any:
        """Stage `state` at the last key and run the script, in one round trip; then wait for the durability."""
        wait, promised = self._wait, self.durability
        pipe = self._ready().pipeline(transaction=False)
        pipe.set(keys[-1], state, ex=60)
        pipe.eval(script, len(keys), *keys, *args)
        if wait:  # on the same connection: WAIT is about this connection's writes
            pipe.execute_command(*wait)
        replies = await self._call(pipe.execute())
        if wait:
            confirmed = replies[2][0] if isinstance(replies[2], list) else replies[2]
            if confirmed < 1:
                log.warning("%s did not confirm within %d ms: commits are not %s now", self.name, WAIT_MS, promised)
                self.durability, self._wait = "memory", ()
        return replies[1]

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning(message)

    async def session_keys(self) -> AsyncIterator[SessionKey]:
        """Every session that has a hash, index or not. Reads all key names: for fsck only."""
        try:
            async for name in self._ready().scan_iter(match=f"{self.keys.prefix}:{{*}}", count=1000):
                key = self.keys.parse(name.decode())
                if key is not None:
                    yield key
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"{self.name} does not answer: {error}; is it running?") from error

    async def detect(self) -> None:
        """See what a commit survives here: appendfsync always or WAITAOF = fsynced, WAIT with a replica = acked."""
        client = self._ready()
        server = await self._call(client.info("server"))
        persistence = await self._call(client.info("persistence"))
        replication = await self._call(client.info("replication"))
        try:
            config = await self._call(client.config_get("appendfsync", "maxmemory-policy"))
        except StoreUnavailable as error:
            self._warn_once(f"{self.name} does not tell its configuration: a weak durability is assumed ({error})")
            config = {}
        if config.get("maxmemory-policy", "noeviction") != "noeviction":
            self._warn_once(
                f"{self.name} has maxmemory-policy {config['maxmemory-policy']} and drops sessions when it is full; "
                "set maxmemory-policy noeviction"
            )
        version = tuple(int(part) for part in str(server["redis_version"]).split(".")[:2])
        aof = bool(int(persistence.get("aof_enabled", 0)))
        self.durability, self._wait = "memory", ()
        if aof and config.get("appendfsync") == "always":
            self.durability = "fsynced"
        elif aof and version >= (7, 2) and self._may_wait:
            self.durability, self._wait = "fsynced", ("WAITAOF", 1, 0, WAIT_MS)
        elif int(replication.get("connected_slaves", 0)) > 0 and self._may_wait:
            self.durability, self._wait = "acked", ("WAIT", 1, WAIT_MS)
