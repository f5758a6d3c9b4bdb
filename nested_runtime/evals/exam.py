"""Exams: what one session is told, the small talk after it, and the questions, each with its right answer.

An exam is a function of (seed, plan, index) and of the split: phrasings and values of dev and test never occur in
training. No question and no small talk names a value that was told.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nested_runtime.errors import ConfigError
from nested_runtime.evals.invented import InventedWriter
from nested_runtime.evals.wording import holds
from nested_runtime.train.data import CHAT_FILES, documents
from nested_runtime.train.dialogues import DialogueSpec, ExhaustedError, Fact, Message, Weights, Writer, mentions
from nested_runtime.train.messages import ProbeKind
from nested_runtime.train.values import lines

__all__ = ["Exam", "Examiner", "Exchange", "Lengths", "Plan", "Question", "held_out_exchanges"]

Exchange = tuple[str, str]  # what the user says, what the assistant says
Lengths = Callable[[Sequence[str]], list[int]]  # tokens of each text

STYLE = DialogueSpec(p_pair=0.0)  # one fact a message, otherwise as varied as the dialogues of training
LONGEST_EXCHANGE = 160  # characters
TRIES = 200
MARKS = 2  # tokens of a message beside its content


@dataclass(frozen=True)
class Plan:
    """What one row of a report measures: how much is told, how far away it is, what is asked."""

    name: str
    facts: int
    filler_tokens: int = 0
    corrected: int = 0  # facts that get another value before the questions
    untold: int = 0  # questions about what was never told
    invented: bool = False  # invented words of several tokens as the only values


@dataclass(frozen=True)
class Question:
    """A question, and what makes an answer right."""

    text: str
    kind: ProbeKind
    expected: str  # "" = never told
    outdated: tuple[str, ...]  # values it had before
    told: tuple[str, ...]  # every value of the session, outdated ones included
    relation: str
    family: str  # "generic": an open key; "toml": a relation with phrasings of its own
    value_kind: str
    reference: Message  # an answer as training would have it, the value in a span of its own

    @property
    def wrong(self) -> tuple[str, ...]:
        """The values that no right answer names: older ones; of what was never told, all."""
        return self.told if self.kind == "unknown" else self.outdated

    @property
    def spoilt(self) -> bool:
        """Whether even the reference names one of them: "what color", where "color" is a value told."""
        return any(holds(self.reference.content, value) for value in self.wrong)


@dataclass(frozen=True)
class Exam:
    """One session: messages of the user, then small talk, then questions."""

    tellings: tuple[str, ...]
    small_talk: tuple[Exchange, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Examiner:
    """Writes exams. `lengths` counts tokens as the examined model does; `chats` serve as small talk."""

    split: str
    seed: int
    lengths: Lengths
    chats: Sequence[Exchange] = ()

    def exam(self, plan: Plan, index: int) -> Exam:
        """The exam of one session."""
        rng = random.Random(f"{self.seed}:{plan.facts}:{plan.corrected}:{plan.untold}:{plan.invented}:{index}")
        for _ in range(TRIES):
            try:
                return self._write(plan, rng)
            except ExhaustedError:
                continue
        raise ConfigError(f"no session of {plan.facts} facts can be written that are told apart; use fewer --facts")

    def _write(self, plan: Plan, rng: random.Random) -> Exam:
        spec = replace(STYLE, facts=(plan.facts, plan.facts))
        writer = InventedWriter(rng, self.split, spec, self.lengths) if plan.invented else Writer(rng, self.split, spec)
        facts = writer.choose_facts()
        if len(facts) < plan.facts:
            raise ExhaustedError("too few facts that cannot be mistaken for each other")
        for fact in facts:
            writer.tell([fact])
        for fact in rng.sample(facts, plan.corrected):
            writer.correct(fact)
        tellings = tuple(m.content for m in writer.messages if m.role == "user")
        asked = facts + [other for _ in range(plan.untold) if (other := writer.untold()) is not None]
        rng.shuffle(asked)
        questions = tuple(_question(writer, fact) for fact in asked)
        if any(mentions(q.text.lower(), value) for q in questions for value in writer.taken):
            raise ExhaustedError("a question names a value")
        if any(q.spoilt for q in questions):
            raise ExhaustedError("a right answer names a value that makes it wrong")
        return Exam(tellings, tuple(self._small_talk(writer, plan.filler_tokens)), questions)

    def _small_talk(self, writer: Writer, wanted: int) -> Iterator[Exchange]:
        """Exchanges of `wanted` tokens in all, the last one whole."""
        while wanted > 0:
            drawn = [self._exchange(writer) for _ in range(wanted // 24 + 1)]
            sizes = self.lengths([text for exchange in drawn for text in exchange])
            for exchange, user, assistant in zip(drawn, sizes[::2], sizes[1::2], strict=True):
                if wanted <= 0:
                    return
                yield exchange
                wanted -= user + assistant + 2 * MARKS

    def _exchange(self, writer: Writer) -> Exchange:
        for _ in range(100 if self.chats else 0):
            exchange = writer.rng.choice(self.chats)
            if not any(mentions(text.lower(), value) for text in exchange for value in writer.taken):
                return exchange
        return writer.filler(), writer.rng.choice(lines("replies"))


def _question(writer: Writer, fact: Fact) -> Question:
    writer.question(fact)
    is_told = fact.told >= 0
    if is_told:
        spans = writer.reply(fact.relation.answers, fact, (Weights.value, Weights.answer))
    else:
        spans = writer.reply(fact.relation.unknowns, fact, (Weights.unknown, Weights.unknown))
    return Question(
        text=writer.messages[-1].content,
        kind="unknown" if not is_told else "update" if fact.outdated else "recall",
        expected=fact.value if is_told else "",
        outdated=tuple(fact.outdated),
        told=tuple(value for each in writer.facts for value in (each.value, *each.outdated)),
        relation=fact.relation.name,
        family="generic" if fact.relation.generic else "toml",
        value_kind=fact.relation.value,
        reference=Message("assistant", tuple(span for span in spans if span.text)),
    )


def held_out_exchanges(folder: Path) -> list[Exchange]:
    """Short exchanges of the chats in a data folder that are kept from training."""
    chats = [d.messages for d in documents(folder, CHAT_FILES) if d.held_out]
    pairs = [pair for chat in chats for pair in zip(chat[::2], chat[1::2], strict=False)]
    return [
        (user, assistant)
        for (role, user), (_, assistant) in pairs
        if role == "user" and len(user) + len(assistant) < LONGEST_EXCHANGE
    ]
