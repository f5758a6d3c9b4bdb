"""The Python SDK: sessions with a memory, blocking or async, without torch.

from clients.python import Client

with Client() as client:
    alice = client.session("alice")
    alice.chat("My dog is called Rex.")
    for piece in alice.stream("What is my dog called?"):
        print(piece, end="", flush=True)

`openai(session="alice")` and `async_openai(...)` give clients of the openai package that are bound to a session.
"""

from __future__ import annotations

from .admin import Admin, AsyncAdmin
from .client import DEFAULT_BASE_URL, AsyncClient, AsyncSession, Client, Session
from .drivers import AsyncReplyStream, ReplyStream
from .errors import (
    APIError,
    BadRequest,
    ClientError,
    ConfigError,
    Conflict,
    ConnectionFailed,
    NotAuthorized,
    NotFound,
    ProtocolError,
    RateLimited,
    ServerError,
)
from .openai_clients import async_openai, openai
from .types import ChatOptions, Learn, Level, Message, Model, Reply, SessionInfo, SessionRef, Snapshot, Usage, Version

__all__ = [
    "DEFAULT_BASE_URL",
    "APIError",
    "Admin",
    "AsyncAdmin",
    "AsyncClient",
    "AsyncReplyStream",
    "AsyncSession",
    "BadRequest",
    "ChatOptions",
    "Client",
    "ClientError",
    "ConfigError",
    "Conflict",
    "ConnectionFailed",
    "Learn",
    "Level",
    "Message",
    "Model",
    "NotAuthorized",
    "NotFound",
    "ProtocolError",
    "RateLimited",
    "Reply",
    "ReplyStream",
    "ServerError",
    "Session",
    "SessionInfo",
    "SessionRef",
    "Snapshot",
    "Usage",
    "Version",
    "async_openai",
    "openai",
]
