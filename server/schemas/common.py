"""What chat, completion and response requests share: sampling, memory, and how unknown parameters are treated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nested_runtime.core import SamplingParams, TokenLogprobs
from nested_runtime.errors import RequestError
from nested_runtime.sessions import Finished
from nested_runtime.tokenizer import Tokenizer

__all__ = [
    "Closed",
    "Generation",
    "MemoryOptions",
    "StreamOptions",
    "Strict",
    "known_but_unsupported",
    "session_body",
    "surprise_body",
    "usage_body",
]


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode (a lone surrogate?)") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
"""Text that is repeated in the reply."""


class Strict(BaseModel):
    """No silent conversions. Unknown fields are kept, to be named in a warning header."""

    model_config = ConfigDict(strict=True, extra="allow")


class Closed(BaseModel):
    """Our own objects: an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


class MemoryOptions(Closed):
    """How a session's memory treats this request."""

    learn: Literal["all", "prompt", "off"] = Field("all", description="Commit the state after reply, prompt or not.")
    history: Literal["auto", "new", "resent"] = Field(
        "auto",
        description="Which messages are new. auto: a conversation with replies in it is compared with what was read; "
        "new: all messages are new; resent: compare always (regenerates a first answer).",
    )
    surprise: bool = Field(
        False,
        description="Report -log p of every token the memory reads, as `session.surprise`. Chat completions only.",
    )


class StreamOptions(Strict):
    """OpenAI's stream_options and vLLM's continuous_usage_stats."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Generation(Strict):
    """Fields of every generating request."""

    # parameters of OpenAI that would change the answer, and that this server cannot honour
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    REPORTS_SURPRISE: ClassVar[bool] = False

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=16)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), le=(1 << 63) - 1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    ignore_eos: bool | None = False
    min_tokens: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[int] | None = Field(None, max_length=64)
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    user: Text | None = None
    metadata: dict[Text, Text] | None = None
    session_id: str | None = None
    request_id: str | None = None
    memory: MemoryOptions = Field(default_factory=lambda: MemoryOptions.model_validate({}))

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings; empty ones and more than 16 are refused."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > 16 or not all(stops):
            raise RequestError(f"stop has {len(stops)} strings, give 1 to 16, none of them empty", param="stop")
        return stops

    def unknown(self) -> list[str]:
        """Names of the parameters nobody here knows."""
        return sorted(self.model_extra or {})

    def asked_tokens(self, own: int | None) -> int | None:
        """How long a reply was asked for, by the API's own parameter or max_tokens; None = not said."""
        if own is None and self.max_tokens == 0:
            raise RequestError("max_tokens is 0; a reply has at least 1 token", param="max_tokens")
        return self.max_tokens if own is None else own

    def sampling(self, max_tokens: int, logprobs: int | None, choice: int = 0) -> SamplingParams:
        """The engine's parameters. Choices of one request differ in their seed."""
        if (self.min_tokens or 0) > max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, over max_tokens {max_tokens}; raise max_tokens", param="min_tokens"
            )
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=_bias(self.logit_bias),
            stop=self.stops,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            seed=None if self.seed is None else self.seed + choice,
            logprobs=logprobs,
            prompt_logprobs=0 if self.prompt_logprobs is None and self.memory.surprise else self.prompt_logprobs,
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _bias(bias: Mapping[str, float] | None) -> dict[int, float]:
    result = {}
    for token, value in (bias or {}).items():
        if not (token.isascii() and token.isdigit()) or not -100 <= value <= 100:
            raise RequestError(
                f"logit_bias has {token!r}: {value}; keys are token ids, values -100 to 100", param="logit_bias"
            )
        result[int(token)] = float(value)
    return result


def known_but_unsupported(body: Generation) -> None:
    """Refuse what is asked for by name and cannot be done: silence would be worse than an error."""
    given = body.model_extra or {}
    for name, harmless in body.UNSUPPORTED.items():
        if name in given and given[name] is not None and given[name] not in harmless:
            raise RequestError(
                f"{name} is not supported by this server; leave it out", param=name, code="unsupported_parameter"
            )
    if body.memory.surprise and not body.REPORTS_SURPRISE:
        raise RequestError(
            "memory.surprise is reported by chat completions and learn only; leave it out, or send prompt_logprobs",
            param="memory.surprise",
            code="unsupported_parameter",
        )


def usage_body(asked: Sequence[Finished], answered: Sequence[Finished]) -> dict[str, Any]:
    """OpenAI's usage: the prompts of `asked`, one of each prompt, and the replies of `answered`."""
    prompt = sum(one.prompt_tokens for one in asked)
    completion = sum(one.completion_tokens for one in answered)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in asked)},
    }


def session_body(finished: Finished, surprise: Tokenizer | None = None) -> dict[str, Any]:
    """`{"session": {...}}` of a reply, or nothing when memoryless. With a tokenizer: the surprise of the tokens."""
    report = finished.session
    if report is None:
        return {}
    told = {} if surprise is None else {"surprise": surprise_body(finished.prompt_logprobs or (), surprise)}
    return {
        "session": {
            "id": report.id,
            "version": report.version,
            "learned_tokens": report.learned_tokens,
            "digest": report.digest,
            "durability": report.durability,
            "history": report.history,
            "updates": report.updates,
            "updates_refused": report.refused,
            **told,
        }
    }


def surprise_body(entries: Sequence[TokenLogprobs | None], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """-log p (nats) of every token read, given all before it and the memory as it was at that token.

    The first token of a turn is left out: nothing predicted it in this turn. `special` marks the template's tokens.
    """
    return [
        {
            "token": (data := tokenizer.token_bytes(one.token)).decode("utf-8", "replace"),
            "bytes": list(data),
            "surprise": min(-one.logprob, 9999.0),
            "special": one.token in tokenizer.special_ids,
        }
        for one in entries
        if one is not None
    ]
