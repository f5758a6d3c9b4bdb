"""The Responses API: the request, the response object and its stream."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import orjson
from pydantic import ConfigDict, Field

from nested_runtime.errors import NotFound, RequestError
from nested_runtime.sessions import Delta, Finished

from .chat import Part, text_of
from .common import Generation, Strict, session_body

__all__ = ["ResponseReply", "ResponsesRequest", "parse_id", "response_id"]


class InputItem(Strict):
    """One message of the input."""

    type: str | None = "message"
    role: str | None = None
    content: str | list[Part] | None = None


class ResponsesRequest(Generation):
    """POST /v1/responses."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "hope-nano", "input": "My dog is called Rex.", "store": True}}
    )
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "text": ({"format": {"type": "text"}},),
        "background": (False,),
        "conversation": (),
        "prompt": (),
        "reasoning": (),
        "include": ([],),
        "max_tool_calls": (),
        "truncation": ("disabled",),
    }

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    previous_response_id: str | None = Field(None, max_length=1024)
    store: bool | None = True

    def items(self) -> list[dict[str, str]]:
        """The input as messages."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        result = []
        for number, item in enumerate(self.input):
            where = f"input.{number}"
            if item.type not in ("message", None) or item.role not in ("system", "developer", "user", "assistant"):
                raise RequestError(
                    f"{where} is a {str(item.type)[:40]!r} of role {str(item.role)[:40]!r}; only messages of system, "
                    "developer, user and assistant are supported",
                    param=where,
                    code="unsupported_parameter",
                )
            role = "system" if item.role == "developer" else str(item.role)
            result.append({"role": role, "content": text_of(item.content, f"{where}.content")})
        if not result:
            raise RequestError("input is empty; send at least one message", param="input")
        return result


def response_id(session: str, nonce: str) -> str:
    """An id that says where the response is kept."""
    return "resp_" + base64.urlsafe_b64encode(orjson.dumps([session, nonce])).decode().rstrip("=")


def parse_id(id: str) -> tuple[str, str]:
    """(session, nonce) of a response id; NotFound if it is not one of ours."""
    text = id.removeprefix("resp_")
    try:
        session, nonce = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, TypeError, binascii.Error):
        session = nonce = None
    if not isinstance(session, str) or not isinstance(nonce, str):
        raise NotFound(f"response {id[:80]!r} does not exist")
    return session, nonce


@dataclass
class ResponseReply:
    """Builds the response object and writes its stream of events."""

    id: str
    created: int
    request: ResponsesRequest
    model: str
    sequence: int = 0

    def body(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """The finished response."""
        one = finished[0]
        is_whole = one.finish_reason == "stop"
        return {
            **self._shell("completed" if is_whole else "incomplete"),
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [self._item(one.text, "completed" if is_whole else "incomplete")],
            "usage": {
                "input_tokens": one.prompt_tokens,
                "input_tokens_details": {"cached_tokens": one.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": one.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": one.prompt_tokens + one.completion_tokens,
            },
            **session_body(one),
        }

    def start(self, index: int) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        shell = self._shell("in_progress")
        item = {**self._item("", "in_progress"), "content": []}
        return [
            self._event("response.created", response=shell),
            self._event("response.in_progress", response=shell),
            self._event("response.output_item.added", output_index=0, item=item),
            self._part_event("response.content_part.added", part=_part("")),
        ]

    def delta(self, index: int, delta: Delta, usage: dict[str, Any] | None) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        if not delta.text:
            return []
        return [self._part_event("response.output_text.delta", delta=delta.text, logprobs=[])]

    def end(self, index: int, finished: Finished) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        return self._ending(self.body([finished]))

    def last(self, finished: Sequence[Finished]) -> list[dict[str, Any]]:
        """See `exchange.Chunks`: usage is in the response itself."""
        return []

    def replay(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        self.id = body["id"]
        text = body["output"][0]["content"][0]["text"]
        delta = self._part_event("response.output_text.delta", delta=text, logprobs=[])
        return [*self.start(0), delta, *self._ending(body)]

    def _ending(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        item = body["output"][0]
        text = item["content"][0]["text"]
        return [
            self._part_event("response.output_text.done", text=text, logprobs=[]),
            self._part_event("response.content_part.done", part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{body['status']}", response=body),
        ]

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self.sequence += 1
        return {"type": kind, "sequence_number": self.sequence - 1, **fields}

    def _part_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    @property
    def _item_id(self) -> str:
        return f"msg_{self.id[5:]}"

    def _item(self, text: str, status: str) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self._item_id,
            "status": status,
            "role": "assistant",
            "content": [_part(text)],
        }

    def _shell(self, status: str) -> dict[str, Any]:
        asked = self.request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self.model,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": asked.previous_response_id,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
            "metadata": asked.metadata or {},
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
