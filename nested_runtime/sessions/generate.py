"""One turn on the backend: a start state and tokens in, text and a state out. Knows nothing of the store."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

from nested_runtime.core import FinishReason, Sequence, TokenEvent, TokenLogprobs, TurnResult
from nested_runtime.errors import ContextOverflow, NestedError, Overloaded, RequestError
from nested_runtime.sampling import validate
from nested_runtime.sessions.text import ReplyText, stop_check
from nested_runtime.sessions.turns import Delta, Finished, Started, Turn
from nested_runtime.sessions.vault import ServedModel, Start

__all__ = ["Outcome", "generate"]


@dataclass(frozen=True)
class Outcome:
    """The end of a generation, before anything is committed."""

    finished: Finished
    result: TurnResult | None


@dataclass
class _Reply:
    """What has come back so far."""

    text: ReplyText
    prompt_tokens: int
    special: frozenset[int]
    sampled: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    def add(self, event: TokenEvent) -> Delta:
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if event.token is None:
            return Delta(self.text.flush() if event.finish else "")
        self.sampled += 1
        text = self.text.push(event.token)
        if event.finish is not None:
            text += self.text.flush()
        if event.token in self.special and event.finish is FinishReason.STOP:
            return Delta(text)
        logprobs = (event.logprobs,) if event.logprobs is not None else ()
        self.tokens.append(event.token)
        self.logprobs += logprobs
        return Delta(text, (event.token,), logprobs)

    def finished(self, reason: FinishReason, num_cached: int) -> Finished:
        return Finished(
            text=self.text.text,
            finish_reason="stop" if reason is FinishReason.STOP else "length",
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.sampled,
            cached_tokens=num_cached,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
        )


async def generate(
    model: ServedModel, turn: Turn, start: Start, prompt: list[int], *, keeps: bool
) -> AsyncGenerator[Started | Delta | Outcome, None]:
    """Run `prompt` and the reply from `start`; the last item is the Outcome, with the state if `keeps`.

    Closing the iterator early aborts the sequence: its slot is zeroed and no state comes back.
    """
    turn = _fitted(model, turn, prompt)
    chat = turn.messages is not None
    strip = chat and model.tokenizer.opens_with_space
    reply = ReplyText(model.tokenizer, turn.params.stop, min_tokens=turn.params.min_tokens, strip=strip)
    state = _Reply(reply, len(prompt), model.tokenizer.special_ids)
    sequence = _sequence(model, turn, start, prompt, keeps=keeps)
    events = model.backend.submit(sequence)
    running = True
    try:
        yield Started(len(prompt))
        async for event in events:
            running = event.finish is None
            if event.finish in (FinishReason.ERROR, FinishReason.ABORT):
                raise _failure(event)
            delta = state.add(event)
            if delta.text or delta.tokens:
                yield delta
            if event.finish is not None:
                yield Outcome(state.finished(event.finish, event.num_cached), event.result)
    finally:
        if running:
            model.backend.abort(sequence.id)


def _fitted(model: ServedModel, turn: Turn, prompt: list[int]) -> Turn:
    """The turn with max_tokens that fit, or the error that says why it cannot."""
    limit, wanted = model.backend.max_context, turn.params.max_tokens
    if wanted > limit and not turn.shorten:
        raise RequestError(
            f"max_tokens is {wanted}, over the limit of {limit} of model {model.id!r}; ask for fewer",
            param="max_tokens",
        )
    if turn.shorten:
        wanted = max(1, min(wanted, limit - len(prompt)))
    if len(prompt) + wanted > limit:
        raise ContextOverflow(
            f"n_prompt_tokens={len(prompt)} and max_tokens={wanted} are together over the limit of {limit} tokens a "
            f"turn may read and write with model {model.id!r}; shorten the prompt or ask for fewer tokens",
            param="messages" if turn.messages is not None else "prompt",
        )
    params = replace(turn.params, max_tokens=wanted)
    validate(params, model.tokenizer.vocab_size)
    return replace(turn, params=params)


def _sequence(model: ServedModel, turn: Turn, start: Start, prompt: list[int], *, keeps: bool) -> Sequence:
    params, strip = turn.params, turn.messages is not None and model.tokenizer.opens_with_space
    return Sequence(
        id=turn.id,
        prompt=prompt,
        params=params,
        position=start.position,
        state=start.tensors,
        keep_state=keeps and turn.learn == "all",
        keep_state_at_prompt=keeps and turn.learn == "prompt",
        stop_check=stop_check(model.tokenizer, params.stop, min_tokens=params.min_tokens, strip=strip),
        fork_of=turn.fork_of,
        **_caching(model, turn, start, prompt),
    )


def _caching(model: ServedModel, turn: Turn, start: Start, prompt: list[int]) -> dict[str, Any]:
    """The Sequence's cache_* fields.

    A memoryless request shares what it reads with the tenant's others, a new session its system prompt. Everything else
    is the session's own, found by a turn that reads the same from the same state, and gone when the session is deleted.
    """
    ends = _message_ends(prompt, model)
    is_fresh = start.tensors is None and start.pending is None
    shared = (turn.scope, "", "") if turn.scope is not None and is_fresh else None
    if turn.session is None:
        return {"cache_key": shared, "cache_points": ends}
    fields: dict[str, Any] = {}
    if turn.params.max_tokens and (is_fresh or start.digest):
        fields["cache_own"] = (turn.session.tenant, turn.session.session, start.digest)
        fields["cache_points"] = ends[-2:-1]  # before the last message, which may be edited
    if shared is not None and ends and turn.messages and turn.messages[0]["role"] in ("system", "developer"):
        fields |= {"cache_key": shared, "cache_upto": ends[0]}
        fields["cache_points"] = (ends[0], *fields.get("cache_points", ()))
    return fields


def _message_ends(prompt: list[int], model: ServedModel) -> tuple[int, ...]:
    return tuple(place + 1 for place, token in enumerate(prompt) if token == model.tokenizer.end_id)


def _failure(event: TokenEvent) -> Exception:
    if event.error is not None:
        return event.error
    if event.finish is FinishReason.ABORT:
        stopping = Overloaded("the server is shutting down and aborted this request; nothing was learned: retry later")
        stopping.code = "shutting_down"
        return stopping
    return NestedError("the engine ended this request without saying why; nothing was learned")
