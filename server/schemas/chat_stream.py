"""The chunks of a chat stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nested_runtime.sessions import Delta, Finished

from .chat import ChatReply

__all__ = ["ChatChunks"]


class ChatChunks:
    """First delta has the role, the last choice chunk the finish reason and the session, then usage if asked for."""

    def __init__(self, reply: ChatReply, *, include_usage: bool) -> None:
        self._reply = reply
        self._include_usage = include_usage

    def start(self, index: int) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        return [self._reply.chunk(index, {"role": "assistant", "content": ""})]

    def delta(self, index: int, delta: Delta, usage: dict[str, Any] | None) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        if not delta.text and not (delta.logprobs and self._reply.with_logprobs):
            return []
        return [self._reply.chunk(index, {"content": delta.text}, logprobs=delta.logprobs, usage=usage)]

    def end(self, index: int, finished: Finished) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        return [self._reply.chunk(index, {}, finished=finished)]

    def last(self, finished: Sequence[Finished]) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        return [self._reply.usage_chunk(finished)]

    def replay(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        head = {key: body[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
        chunks = []
        for choice in body["choices"]:
            text = {"index": choice["index"], "delta": choice["message"], "logprobs": choice["logprobs"]}
            end = {"index": choice["index"], "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
            chunks.append({**head, "choices": [{**text, "finish_reason": None}], "usage": None})
            chunks.append({**head, "choices": [end], "usage": None, "session": body.get("session")})
        if self._include_usage:
            chunks.append({**head, "choices": [], "usage": body["usage"]})
        return chunks
