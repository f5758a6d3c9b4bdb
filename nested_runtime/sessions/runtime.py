"""Runtime.run_turn: lease -> match history -> load -> engine -> commit. The one place where store and engine meet."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

from nested_runtime.core import SamplingParams, TurnResult
from nested_runtime.errors import Conflict, HistoryConflict, NestedError, NotFound, RequestError
from nested_runtime.sessions import history
from nested_runtime.sessions.generate import Outcome, generate
from nested_runtime.sessions.history import Match, Record
from nested_runtime.sessions.turns import Answer, Finished, Report, Turn, TurnEvent
from nested_runtime.sessions.vault import ServedModel, Start, Vault, record_of
from nested_runtime.store.base import Lease, SessionKey, StoredAnswer, Version

__all__ = ["Runtime"]


@dataclass(frozen=True)
class _Plan:
    """What a turn is going to do: where its state comes from, what it reads, where it will be committed."""

    head: Version | None
    match: Match
    start: Start
    prompt: list[int]

    @property
    def parent(self) -> int:
        return self.head.number if self.head else 0


class Runtime:
    """Runs turns of several models over one store."""

    def __init__(self, vault: Vault, models: Iterable[ServedModel]) -> None:
        self.vault = vault
        self.models: Mapping[str, ServedModel] = {model.id: model for model in models}
        self._answering: set[tuple[SessionKey, str]] = set()

    def model(self, name: str) -> ServedModel:
        """The model served as `name`; NotFound lists the models there are."""
        if name not in self.models:
            known = ", ".join(sorted(self.models))
            raise NotFound(f"model {name!r} is not served here; use one of: {known}")
        return self.models[name]

    async def run_turn(self, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        """Run one turn; the last event is `Finished`, sent after the memory is durable.

        Use it with `contextlib.aclosing`: closing it early (the client is gone) aborts the turn, and nothing is
        committed. Any exception leaves the session at its old version.
        """
        if turn.session is None or turn.learn == "off":
            events = self._read(turn, turn.session)
        else:
            events = self._learn(turn, turn.session)
        async with aclosing(events):
            async for event in events:
                yield event

    async def absorb(self, turn: Turn) -> Finished:
        """Read the turn's messages into the session without answering."""
        params = SamplingParams(max_tokens=0, prompt_logprobs=turn.params.prompt_logprobs)
        turn = replace(turn, params=params, learn="all", history="new")
        async with aclosing(self._learn(turn, _named(turn.session), kind="learn")) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event
        raise NestedError("the engine ended without an answer; nothing was learned")

    async def _read(self, turn: Turn, key: SessionKey | None) -> AsyncGenerator[TurnEvent, None]:
        """A turn that commits nothing: memoryless, or on the session's state with learn="off"."""
        model = self.model(turn.model)
        plan = await self._plan(model, turn, key)
        async with aclosing(generate(model, turn, plan.start, plan.prompt, keeps=False)) as events:
            async for event in events:
                if not isinstance(event, Outcome):
                    yield event
                    continue
                report = None
                if key is not None:
                    report = self._report(key, plan.parent, plan.head, plan.match.how)
                yield replace(event.finished, session=report)

    async def _learn(self, turn: Turn, key: SessionKey, kind: str = "turn") -> AsyncGenerator[TurnEvent, None]:
        """A turn that ends with a commit, under the session's lease."""
        model = self.model(turn.model)
        with self._only_once(turn, key):
            async with self.vault.hold(key) as lease:
                replayed = await self._replayed(turn, key)
                if replayed is not None:
                    yield replayed
                    return
                plan = await self._plan(model, turn, key, kind)
                async with aclosing(generate(model, turn, plan.start, plan.prompt, keeps=True)) as events:
                    async for event in events:
                        if isinstance(event, Outcome):
                            yield await self._commit(lease, model, turn, plan, event, kind)
                        else:
                            yield event

    async def _plan(self, model: ServedModel, turn: Turn, key: SessionKey | None, kind: str = "turn") -> _Plan:
        versions = await self.vault.versions(key, turn.expect) if key is not None else []
        head = versions[0] if versions else None
        if turn.base is not None:
            how = _based(turn.base, head, versions)
        elif turn.messages is None:
            how = Match(head.number if head else 0, 0, 0, "raw")
        else:
            known = [_as_known(version) for version in versions]
            how = history.match(turn.messages, known, head.number if head else 0, turn.history)
        start = Start()
        if key is not None and how.version:
            source = next(version for version in versions if version.number == how.version)
            start = await self.vault.load(key, source, model)
        return _Plan(head, how, start, self._prompt(model, turn, start, how.num_read, answer=kind == "turn"))

    def _prompt(self, model: ServedModel, turn: Turn, start: Start, num_read: int, *, answer: bool) -> list[int]:
        """Tokens the state has not read: what the last turn left, then what this one brings."""
        left = [] if start.pending is None else [start.pending]
        if turn.messages is None:
            return [*left, *(turn.prompt or ())]
        if left and left[0] not in model.tokenizer.end_ids:
            left.append(model.tokenizer.end_id)  # the last reply was cut short: close it
        goes_on = start.position > 0 or bool(left)
        return [*left, *model.tokenizer.render(turn.messages, answer, num_read=num_read, goes_on=goes_on)]

    async def _commit(
        self, lease: Lease, model: ServedModel, turn: Turn, plan: _Plan, outcome: Outcome, kind: str
    ) -> Finished:
        key, number = lease.key, plan.parent + 1
        encoded = await self.vault.encode(key, number, _left(model, turn, outcome.result), model)
        report = Report(
            id=key.session,
            version=number,
            learned_tokens=encoded.start.position,
            digest=encoded.digest,
            durability=self.vault.store.durability,
            history=plan.match.how,
            updates=outcome.result.updates if outcome.result else 0,
            refused=outcome.result.refused if outcome.result else 0,
        )
        finished = replace(outcome.finished, session=report)
        await self.vault.commit(
            lease,
            plan.parent,
            encoded,
            model,
            kind=kind,
            source=plan.match.version,
            record=_record(turn, plan, finished) if kind == "turn" else None,
            answer=_stored(turn, finished, self.vault.store.limits.answer_bytes),
        )
        # A replica or disk may have failed to confirm this very commit: then it is less durable than was said before.
        return replace(finished, session=replace(report, durability=self.vault.store.durability))

    async def _replayed(self, turn: Turn, key: SessionKey) -> Finished | None:
        """The answer this request already got, if its key was answered; RequestError when the body differs."""
        if turn.answer is None:
            return None
        if turn.answer.attempt is not None:
            return await self._retried(turn.answer, key)
        stored = await self.vault.store.answer(key, turn.answer.key)
        if stored is None:
            return None
        if stored.body_digest != turn.answer.body_digest:
            raise RequestError(
                f"Idempotency-Key {turn.answer.key!r} was used with another request body; take a new key for "
                "a new request",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return Finished(text="", finish_reason="stop", prompt_tokens=0, replayed=stored.answer)

    async def _retried(self, answer: Answer, key: SessionKey) -> Finished | None:
        """The answer that never reached a client which tries again by itself: the head's, if it is to the same body."""
        head = await self.vault.store.head(key) if answer.attempt else None
        if head is None:
            return None
        stored = await self.vault.store.answer(key, _of_version(answer, head.number))
        if stored is None or stored.body_digest != answer.body_digest:
            return None
        return Finished(text="", finish_reason="stop", prompt_tokens=0, replayed=stored.answer)

    @contextmanager
    def _only_once(self, turn: Turn, key: SessionKey) -> Iterator[None]:
        """Refuse a request whose idempotency key is being answered right now."""
        if turn.answer is None or turn.answer.attempt is not None:  # without a key the lease makes them wait
            yield
            return
        mark = (key, turn.answer.key)
        if mark in self._answering:
            raise Conflict(
                f"the request with Idempotency-Key {turn.answer.key!r} is still running; wait for its answer and retry"
            )
        self._answering.add(mark)
        try:
            yield
        finally:
            self._answering.discard(mark)

    def _report(self, key: SessionKey, number: int, head: Version | None, how: str) -> Report:
        durability = self.vault.store.durability
        if head is None:
            return Report(key.session, number, 0, "", durability, how)
        return Report(key.session, number, head.learned_tokens, head.digest, durability, how)


def _based(base: int, head: Version | None, versions: Sequence[Version]) -> Match:
    """Continue from version `base`, as the caller says."""
    if all(version.number != base for version in versions):
        raise HistoryConflict(
            f"the session's version {base} is no longer kept; continue from the newest one, or send "
            "the whole conversation"
        )
    return Match(base, 0, base, "extended" if head and head.number == base else "branched")


def _named(key: SessionKey | None) -> SessionKey:
    if key is None:
        raise RequestError("learning needs a session id; send one", param="session_id")
    return key


def _as_known(version: Version) -> history.Version:
    source = version.source if version.source is not None else (version.parent or 0)
    return history.Version(version.number, source, record_of(version))


def _left(model: ServedModel, turn: Turn, result: TurnResult | None) -> Start:
    """The state to commit. After learn="prompt" the reply that was opened is closed first thing in the next turn."""
    if result is None:
        raise NestedError("the engine returned no state for a turn that learns; nothing was learned")
    unread = turn.learn == "prompt" and turn.messages is not None
    return Start(result.state, result.position, model.tokenizer.end_id if unread else result.pending)


def _record(turn: Turn, plan: _Plan, finished: Finished) -> Record | None:
    """Where the conversation stands now, the reply included."""
    if turn.messages is None:
        return None
    chain = history.digests([*turn.messages, {"role": "assistant", "content": finished.text}])
    root = history.root_of(turn.messages, chain[:-1])
    return Record(root, chain[-1], len(chain), plan.match.start)


def _stored(turn: Turn, finished: Finished, max_bytes: int) -> StoredAnswer | None:
    """What to keep for a repetition. Nobody asked for it by a key of his own: then only if it is not too large."""
    if turn.answer is None:
        return None
    key, answer = turn.answer.key, turn.answer.render(finished)
    if turn.answer.attempt is not None and finished.session is not None:
        if len(answer) > max_bytes:
            return None
        key = _of_version(turn.answer, finished.session.version)
    return StoredAnswer(key, turn.answer.body_digest, answer)


def _of_version(answer: Answer, number: int) -> str:
    return f"{answer.key}:{number}"
