"""Chat completions: the request, and its replies whole and in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from nested_runtime.core import TokenLogprobs
from nested_runtime.errors import RequestError
from nested_runtime.sessions import Finished
from nested_runtime.tokenizer import Tokenizer

from .common import Generation, Strict, session_body, usage_body

__all__ = ["ChatReply", "ChatRequest", "Message", "prompt_logprobs", "text_of", "usage"]


class Part(Strict):
    """A content part; only text is understood."""

    type: str
    text: str | None = None


class Message(Strict):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None


def text_of(content: str | Sequence[Part] | None, param: str) -> str:
    """The text of a message; anything but text is refused by name."""
    if content is None:
        raise RequestError(f"{param} is null; send text", param=param)
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise RequestError(
                f"{param}.{number} is a {part.type[:40]!r} part; this model reads text only",
                param=f"{param}.{number}.type",
                code="unsupported_parameter",
            )
        texts.append(part.text)
    return "\n".join(texts)


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "hope-nano",
                "messages": [{"role": "user", "content": "My dog is called Rex."}],
                "session_id": "alice",
                "max_tokens": 32,
            }
        }
    )
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "web_search_options": (),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "structured_outputs": (),
    }

    REPORTS_SURPRISE: ClassVar[bool] = True

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def conversation(self) -> tuple[dict[str, str], ...]:
        """The messages as the tokenizer renders them."""
        result = []
        for number, message in enumerate(self.messages):
            if message.role in ("tool", "function"):
                raise RequestError(
                    f"messages.{number}.role is {message.role!r}; tools are not supported",
                    param=f"messages.{number}.role",
                    code="unsupported_parameter",
                )
            role = "system" if message.role == "developer" else message.role
            result.append({"role": role, "content": text_of(message.content, f"messages.{number}.content")})
        return tuple(result)

    @property
    def alternatives(self) -> int | None:
        """How many alternatives beside each token; None = no logprobs."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


@dataclass(frozen=True)
class ChatReply:
    """Builds the bodies of one chat reply."""

    id: str
    created: int
    model: str
    tokenizer: Tokenizer
    with_logprobs: bool
    with_prompt_logprobs: bool = False
    with_surprise: bool = False

    def body(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """The whole reply, one choice per element."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self._logprobs(one.logprobs),
                "finish_reason": one.finish_reason,
            }
            for index, one in enumerate(finished)
        ]
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": usage(finished),
            **(prompt_logprobs(finished[0], self.tokenizer) if self.with_prompt_logprobs else {}),
            **self._session(finished[0]),
        }

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: Sequence[TokenLogprobs] = (),
        finished: Finished | None = None,
        usage: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One chunk of a stream."""
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finished.finish_reason if finished else None,
        }
        body = {**self._head("chat.completion.chunk"), "choices": [choice], "usage": usage}
        return {**body, **(self._session(finished) if finished else {})}

    def usage_chunk(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """The chunk before [DONE] when usage was asked for."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(finished)}

    def _session(self, finished: Finished) -> dict[str, Any]:
        return session_body(finished, self.tokenizer if self.with_surprise else None)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = [
            {**self._entry(one.token, one.logprob), "top_logprobs": [self._entry(*other) for other in one.top]}
            for one in logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


def usage(finished: Sequence[Finished]) -> dict[str, Any]:
    """OpenAI's usage. The prompt counts what this turn gave to read, not what the memory had read before."""
    return usage_body(finished[:1], finished)


def prompt_logprobs(finished: Finished, tokenizer: Tokenizer) -> dict[str, Any]:
    """vLLM's prompt_logprobs: per prompt token a mapping of token id to logprob, rank and text."""
    if finished.prompt_logprobs is None:
        return {}
    entries: list[dict[str, Any] | None] = []
    for one in finished.prompt_logprobs:
        if one is None:
            entries.append(None)
            continue
        found = {token: (logprob, rank) for rank, (token, logprob) in enumerate(one.top, 1)}
        found[one.token] = (one.logprob, one.rank)
        entries.append(
            {
                str(token): {
                    "logprob": max(logprob, -9999.0),
                    "rank": rank,
                    "decoded_token": tokenizer.token_bytes(token).decode("utf-8", "replace"),
                }
                for token, (logprob, rank) in found.items()
            }
        )
    return {"prompt_logprobs": entries}
