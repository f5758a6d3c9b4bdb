"""`Client` and `AsyncClient`, and the sessions they open. Every method is written once, as a flow (flows.py)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, Self, TypeVar, Unpack
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from .drivers import Awaiting, Blocking, operation, streaming
from .errors import ConfigError, ProtocolError
from .flows import Call, EventDecoder, Flow, More, json_events, request
from .types import ChatOptions, Level, Message, Model, Reply, SessionInfo, SessionRef, Snapshot, Version, as_messages

__all__ = ["DEFAULT_BASE_URL", "AsyncClient", "AsyncSession", "Client", "Session", "address", "session_id"]

M = TypeVar("M", bound=BaseModel)

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
_nobody: Callable[[int], object] = bool  # to tell of progress
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # a long answer is slow, a dead server is not


class _API:
    """What clients and sessions share: sending, and chat with or without a memory."""

    id: str | None = None  # of the session; None = memoryless
    model: str | None
    retries: int

    def _send(self, call: Call) -> Flow[Any]:
        return _json((yield from request(call, self.retries)))

    @operation
    def chat(self, message: str | Sequence[Message], **options: Unpack[ChatOptions]) -> Flow[Reply]:
        """One turn: send what is new, return the whole reply."""
        call = yield from self._chat_call(message, options, stream=False)
        answer = yield from self._send(call)
        choice = _only_choice(answer)
        message_out = choice.get("message") or {}
        return _reply({**answer, **_ending(choice)}, message_out.get("content") or "")

    @streaming
    def stream(self, message: str | Sequence[Message], **options: Unpack[ChatOptions]) -> Flow[Reply]:
        """One turn, its text as it is written."""
        call = yield from self._chat_call(message, options, stream=True)
        yield from request(call, self.retries)
        decoder, text, fields = EventDecoder(), list[str](), dict[str, Any]()
        while chunk := (yield More()):
            for event in json_events(chunk, decoder):
                if event is None:
                    return _reply(fields, "".join(text))
                fields |= {name: value for name, value in event.items() if value is not None}
                if not event.get("choices"):
                    continue
                choice = _only_choice(event)
                fields |= _ending(choice)
                if piece := (choice.get("delta") or {}).get("content"):
                    text.append(piece)
                    yield piece
        raise ProtocolError(
            "the stream ended without [DONE]: the turn may not have been committed; ask for the session"
        )

    def _chat_call(self, message: str | Sequence[Message], options: ChatOptions, *, stream: bool) -> Flow[Call]:
        body: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        headers = {"Idempotency-Key": body.pop("idempotency_key", None) or uuid.uuid4().hex}
        if (version := body.pop("if_version", None)) is not None:
            headers["If-Match"] = str(version)
        if (learn := body.pop("learn", None)) is not None:
            body["memory"] = {"learn": learn}
        if self.id is not None:
            body["session_id"] = self.id
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if "model" not in body:
            body["model"] = yield from self._default_model()
        body |= {"messages": as_messages(message), **body.pop("extra", {})}
        return Call("POST", "/v1/chat/completions", json=body, headers=MappingProxyType(headers), stream=stream)

    def _default_model(self) -> Flow[str]:
        """The client's model, else the first one served (asked once)."""
        if self.model is None:
            served = _parse_list(Model, (yield from self._send(Call("GET", "/v1/models"))))
            if not served:
                raise ProtocolError("the server serves no model; start it with one")
            self.model = served[0].id
        return self.model


class _SessionAPI(_API):
    """One session's memory. The object holds no state but the id: two of them are the same session."""

    id: str

    def _call(self, method: str, *path: str, **rest: Any) -> Call:
        return Call(method, "/".join(["/v1/sessions", quote(self.id, safe=""), *path]), **rest)

    @operation
    def info(self) -> Flow[SessionInfo]:
        """Version, tokens, bytes and digest as stored."""
        return _parse(SessionInfo, (yield from self._send(self._call("GET"))))

    @operation
    def delete(self) -> Flow[None]:
        """Erase the memory with its versions, snapshots and history. There is no way back."""
        yield from self._send(self._call("DELETE"))

    @operation
    def reset(self, levels: Sequence[str] | None = None) -> Flow[SessionInfo]:
        """Forget: everything, or the named levels only. Earlier versions stay restorable."""
        body = {} if levels is None else {"levels": list(levels)}
        return _parse(SessionInfo, (yield from self._send(self._call("POST", "reset", json=body))))

    @operation
    def history(self) -> Flow[list[Version]]:
        """The kept versions, newest first."""
        return _parse_list(Version, (yield from self._send(self._call("GET", "history"))))

    @operation
    def levels(self, *, version: int | None = None) -> Flow[list[Level]]:
        """Size, norm and clock of every memory level, now or at a kept version."""
        params = {} if version is None else {"version": version}
        return _parse_list(Level, (yield from self._send(self._call("GET", "levels", params=params))))

    @operation
    def snapshot(self, label: str = "", *, version: int | None = None) -> Flow[Snapshot]:
        """Keep the present version, or the one given, until the snapshot is deleted."""
        body = {"label": label} if version is None else {"label": label, "version": version}
        return _parse(Snapshot, (yield from self._send(self._call("POST", "snapshot", json=body))))

    @operation
    def snapshots(self) -> Flow[list[Snapshot]]:
        """The snapshots kept, oldest first."""
        return _parse_list(Snapshot, (yield from self._send(self._call("GET", "snapshots"))))

    @operation
    def delete_snapshot(self, snapshot: str) -> Flow[None]:
        """Give a snapshot up."""
        yield from self._send(self._call("DELETE", "snapshots", quote(snapshot, safe="")))

    @operation
    def restore(self, snapshot: str | None = None, *, version: int | None = None) -> Flow[SessionInfo]:
        """Go back to a snapshot or to a kept version, as a new version."""
        if (snapshot is None) == (version is None):
            raise ConfigError("restore takes either a snapshot or version=; give one of them")
        body = {"version": version} if snapshot is None else {"snapshot": snapshot}
        return _parse(SessionInfo, (yield from self._send(self._call("POST", "restore", json=body))))

    @operation
    def fork(self, id: str, *, version: int | None = None) -> Flow[SessionInfo]:
        """Copy the memory, at a kept version if one is given, into the new session `id`."""
        body = {"id": id} if version is None else {"id": id, "version": version}
        return _parse(SessionInfo, (yield from self._send(self._call("POST", "fork", json=body))))

    @operation
    def learn(self, text: str, *, if_version: int | None = None) -> Flow[SessionRef]:
        """Read `text` into the memory without answering; `Conflict` if it is at another version than `if_version`."""
        headers = {} if if_version is None else {"If-Match": str(if_version)}
        answer = yield from self._send(self._call("POST", "learn", json={"text": text}, headers=headers))
        return _parse(SessionRef, answer.get("session") if isinstance(answer, dict) else answer)

    @operation
    def consolidate(self, *, passes: int = 1, decay: float = 0.0) -> Flow[SessionInfo]:
        """Let slower levels learn the recent tokens, as a new version; faster ones lose `decay` (0 to 1) of theirs."""
        body = {"passes": passes, "decay": decay}
        return _parse(SessionInfo, (yield from self._send(self._call("POST", "consolidate", json=body))))

    @operation
    def export(self, progress: Callable[[int], object] = _nobody) -> Flow[bytes]:
        """The memory as one portable safetensors blob. `progress` is told the size of each piece that arrives."""
        response = yield from request(self._call("GET", "export", stream=True), self.retries)
        pieces: list[bytes] = []
        while piece := (yield More()):
            pieces.append(piece)
            progress(len(piece))
        blob = b"".join(pieces)
        if len(blob) != int(response.headers.get("content-length", len(blob))):
            raise ProtocolError(f"the export was cut off after {len(blob)} bytes; ask again")
        return blob

    @operation
    def import_(self, blob: bytes) -> Flow[SessionInfo]:
        """Replace the memory by an exported one. It must be of the served model."""
        call = self._call("PUT", "import", content=blob, headers={"Content-Type": "application/octet-stream"})
        return _parse(SessionInfo, (yield from self._send(call)))


class Session(_SessionAPI, Blocking):
    """A session of a `Client`."""

    def __init__(self, client: Client, id: str) -> None:
        self.id = session_id(id)
        self._http, self.model, self.retries = client._http, client.model, client.retries


class AsyncSession(_SessionAPI, Awaiting):
    """A session of an `AsyncClient`."""

    def __init__(self, client: AsyncClient, id: str) -> None:
        self.id = session_id(id)
        self._http, self.model, self.retries = client._http, client.model, client.retries


class _ClientAPI(_API):
    """The server. `chat` and `stream` on it are memoryless."""

    @operation
    def sessions(self) -> Flow[list[SessionInfo]]:
        """The sessions of this API key, page after page."""
        found: list[SessionInfo] = []
        cursor: str | None = ""
        while cursor is not None:
            params = {"cursor": cursor} if cursor else {}
            answer = yield from self._send(Call("GET", "/v1/sessions", params=params))
            found += _parse_list(SessionInfo, answer)
            cursor = answer.get("next") or None
        return found

    @operation
    def models(self) -> Flow[list[Model]]:
        """The models served."""
        return _parse_list(Model, (yield from self._send(Call("GET", "/v1/models"))))

    @operation
    def probe(self, path: str) -> Flow[dict[str, Any]]:
        """Ask a GET route such as `/health` or `/ready` for its JSON, without retries."""
        answer = _json((yield from request(Call("GET", path), 0)))
        return answer if isinstance(answer, dict) else {"answer": answer}


class Client(_ClientAPI, Blocking):
    """Talks to a Nested Runtime server.

        with Client() as client:
            alice = client.session("alice")
            alice.chat("My dog is called Rex.")
            print(alice.chat("What is my dog called?").text)

    `base_url` and `api_key` default to NESTED_BASE_URL and NESTED_API_KEY, `model` to the first one served. `retries`
    counts the extra attempts at what failed on the way; turns carry an idempotency key.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        model: str | None = None,
        retries: int = 2,
        timeout: httpx.Timeout | float = _TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url, key = address(base_url, api_key)
        self.model, self.retries = model, retries
        self._http = httpx.Client(
            base_url=self.base_url, headers=_authorization(key), timeout=timeout, transport=transport
        )

    def session(self, id: str) -> Session:
        """The session `id`; it begins to exist with its first turn."""
        return Session(self, id)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_ClientAPI, Awaiting):
    """As `Client`, awaited."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        model: str | None = None,
        retries: int = 2,
        timeout: httpx.Timeout | float = _TIMEOUT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url, key = address(base_url, api_key)
        self.model, self.retries = model, retries
        self._http = httpx.AsyncClient(
            base_url=self.base_url, headers=_authorization(key), timeout=timeout, transport=transport
        )

    def session(self, id: str) -> AsyncSession:
        """The session `id`; it begins to exist with its first turn."""
        return AsyncSession(self, id)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def address(base_url: str | None, api_key: str | None) -> tuple[str, str | None]:
    """URL and key: arguments, else environment, else defaults. The `/v1` that OpenAI clients want is accepted."""
    url = (base_url or os.environ.get("NESTED_BASE_URL") or DEFAULT_BASE_URL).rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"base URL {url!r} has no http:// or https://; give one such as {DEFAULT_BASE_URL}")
    key = api_key or os.environ.get("NESTED_API_KEY")
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError("the API key has characters that no HTTP header can carry; check NESTED_API_KEY or api_key")
    return url, key or None


def _authorization(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def session_id(id: str) -> str:
    """`id`, when it can be one."""
    if not id or len(id) > 256 or not id.isprintable() or id in {".", ".."}:  # dots would be resolved as a path
        raise ConfigError(f"session id {id[:40]!r} is refused: use 1 to 256 printable characters, not only . or ..")
    return id


def _json(response: httpx.Response) -> Any:
    if not response.content:
        return {}
    try:
        return response.json()
    except ValueError:
        raise ProtocolError(f"{response.url} did not answer JSON; is it a Nested Runtime server?") from None


def _parse(kind: type[M], answer: Any) -> M:
    try:
        return kind.model_validate(answer)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise ProtocolError(f"the server's answer is not a {kind.__name__}: {field}: {first['msg']}") from None


def _parse_list(kind: type[M], answer: Any) -> list[M]:
    """Read OpenAI's list object, `{"object": "list", "data": [...]}`."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        raise ProtocolError(f"the server's answer is not a list of {kind.__name__}: {str(answer)[:200]}")
    return [_parse(kind, item) for item in data]


def _only_choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        raise ProtocolError(f"the server's answer has no single choice: {str(answer)[:200]}")
    return choices[0]


def _reply(fields: dict[str, Any], text: str) -> Reply:
    kept = {name: value for name, value in fields.items() if name not in {"choices", "object"}}
    return _parse(Reply, {**kept, "text": text})


def _ending(choice: dict[str, Any]) -> dict[str, Any]:
    reason = choice.get("finish_reason")
    return {} if reason is None else {"finish_reason": reason}
