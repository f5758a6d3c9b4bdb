"""Text completions: the request, and its replies whole and in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from nested_runtime.core import TokenLogprobs
from nested_runtime.errors import RequestError
from nested_runtime.sessions import Delta, Finished
from nested_runtime.tokenizer import Tokenizer

from .chat import prompt_logprobs
from .common import Generation, session_body, usage_body

__all__ = ["CompletionReply", "CompletionRequest", "Prompt"]

MAX_PROMPTS = 128


@dataclass(frozen=True)
class Prompt:
    """One prompt as tokens and as text."""

    tokens: tuple[int, ...]
    text: str


class CompletionRequest(Generation):
    """POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "hope-nano", "prompt": "Once upon a time", "max_tokens": 16}}
    )
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "suffix": ("",),
        "best_of": (1,),
        "response_format": ({"type": "text"},),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "structured_outputs": (),
    }

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = False

    @property
    def scores(self) -> bool:
        """Echo with logprobs asks how likely the prompt is: this never teaches a memory."""
        return bool(self.echo) and self.logprobs is not None

    def prompts(self, tokenizer: Tokenizer) -> list[Prompt]:
        """All prompts; empty ones are refused."""
        is_one = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        given = [self.prompt] if is_one else self.prompt
        prompts = [_prompt(one, tokenizer) for one in given]
        if not 1 <= len(prompts) <= MAX_PROMPTS or not all(one.tokens for one in prompts):
            raise RequestError(
                f"prompt has {len(prompts)} prompts; give 1 to {MAX_PROMPTS}, none empty", param="prompt"
            )
        return prompts


def _prompt(given: object, tokenizer: Tokenizer) -> Prompt:
    if isinstance(given, str):
        return Prompt(tuple(tokenizer.encode(given)), given)
    tokens = tuple(given) if isinstance(given, list) else ()
    for token in tokens:
        if not isinstance(token, int) or not 0 <= token < tokenizer.vocab_size:
            raise RequestError(f"prompt has token {token!r}, not in 0..{tokenizer.vocab_size - 1}", param="prompt")
    return Prompt(tokens, tokenizer.decode(tokens))


@dataclass
class CompletionReply:
    """Builds the bodies of one completion: `count` choices for every prompt. Also writes its stream."""

    id: str
    created: int
    model: str
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    count: int
    echo: bool
    logprobs: int | None
    include_usage: bool
    lengths: dict[int, int] = field(default_factory=dict)  # characters of a streamed choice's tokens so far

    def body(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """The whole reply."""
        choices = []
        for index, one in enumerate(finished):
            prompt = self.prompts[index // self.count]
            text = prompt.text + one.text if self.echo else one.text
            entries: list[TokenLogprobs | int | None] = list(self._echoed(prompt, one))
            choices.append(self._choice(index, text, self._logprobs([*entries, *one.logprobs], 0), one))
            if one.prompt_logprobs is not None and not self.echo:
                choices[-1] |= prompt_logprobs(one, self.tokenizer)
        return {
            **self._head(),
            "choices": choices,
            "usage": self._usage(finished),
            **session_body(finished[0]),
        }

    def _echoed(self, prompt: Prompt, one: Finished) -> Iterable[TokenLogprobs | int]:
        """The prompt's entries; the first token has no log-probability unless a memory came before it."""
        if not self.echo or one.prompt_logprobs is None:
            return ()
        own = one.prompt_logprobs[-len(prompt.tokens) :]
        return (entry or token for entry, token in zip(own, prompt.tokens, strict=True))

    def start(self, index: int) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        text = self.prompts[index // self.count].text
        self.lengths[index] = len(text) if self.echo else 0
        return [self._chunk(self._choice(index, text, None, None))] if self.echo else []

    def delta(self, index: int, delta: Delta, usage: dict[str, Any] | None) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        logprobs = self._logprobs(delta.logprobs, self.lengths[index]) if delta.logprobs else None
        if logprobs is not None:
            self.lengths[index] += sum(len(token) for token in logprobs["tokens"])
        return [self._chunk(self._choice(index, delta.text, logprobs, None), usage)] if delta.text or logprobs else []

    def end(self, index: int, finished: Finished) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        return [{**self._chunk(self._choice(index, "", None, finished)), **session_body(finished)}]

    def last(self, finished: Sequence[Finished]) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        return [{**self._head(), "choices": [], "usage": self._usage(finished)}]

    def replay(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """See `exchange.Chunks`."""
        chunks = [{**body, "choices": [choice], "usage": None} for choice in body["choices"]]
        return chunks + ([{**body, "choices": []}] if self.include_usage else [])

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _chunk(self, choice: dict[str, Any], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head(), "choices": [choice], "usage": usage}

    def _choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finished: Finished | None
    ) -> dict[str, Any]:
        reason = finished.finish_reason if finished else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, entries: Sequence[TokenLogprobs | int | None], offset: int) -> dict[str, Any] | None:
        """OpenAI's old format: parallel lists. An int is a token without log-probability."""
        if self.logprobs is None:
            return None
        result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token = entry if isinstance(entry, int) else entry.token if entry else 0
            text = self._text(token)
            known = entry if isinstance(entry, TokenLogprobs) else None
            result["tokens"].append(text)
            result["text_offset"].append(offset)
            result["token_logprobs"].append(max(known.logprob, -9999.0) if known else None)
            top = {self._text(t): max(p, -9999.0) for t, p in reversed(known.top)} if known else None
            result["top_logprobs"].append(top)
            offset += len(text)
        return result

    def _text(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace")

    def _usage(self, finished: Sequence[Finished]) -> dict[str, Any]:
        return usage_body(finished[:: self.count], finished)
