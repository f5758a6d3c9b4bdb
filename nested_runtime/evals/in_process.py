"""A checkpoint in this process: all sessions at once in one engine."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from nested_runtime.core import SamplingParams, Sequence, TokenEvent, TokenLogprobs, TurnResult
from nested_runtime.engine.engine import Engine
from nested_runtime.errors import NestedError
from nested_runtime.evals.exam import Exam, Question
from nested_runtime.evals.subject import MAX_TOKENS, Forced, Progress, Transcript
from nested_runtime.kernels.denormals import flushed_denormals
from nested_runtime.models.loading import LoadedModel
from nested_runtime.tokenizer import IncrementalDecoder
from nested_runtime.train.data import render_dialogue
from nested_runtime.train.dialogues import Dialogue, Weights

__all__ = ["InProcess"]

GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
READ_ONLY = SamplingParams(max_tokens=0, temperature=0.0)
FORCED = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)


@dataclass
class _Outcome:
    """One sequence's end."""

    text: str = ""
    memory: TurnResult | None = None
    logprobs: tuple[TokenLogprobs | None, ...] = ()


_Visit = Generator[list[Sequence], list[_Outcome], Transcript]
"""One session: yields sequences that may run together, is sent their outcomes."""


@dataclass
class _Group:
    visit: _Visit
    sequences: list[Sequence] = field(default_factory=list)
    outcomes: dict[str, _Outcome] = field(default_factory=dict)


class InProcess:
    """Subject over a loaded model. `slots`: sequences of one engine step."""

    def __init__(self, loaded: LoadedModel, *, slots: int = 64, max_batch_tokens: int = 1024) -> None:
        self.name, self.fingerprint, self.where = loaded.id, loaded.fingerprint, str(loaded.folder)
        self._tokenizer = loaded.tokenizer
        self._engine = Engine(
            loaded.model,
            capacity=slots,
            end_tokens=(loaded.tokenizer.end_id,),
            max_batch_tokens=max_batch_tokens,
            max_queue=1 << 30,
        )
        self._count = 0

    def lengths(self, texts: Many[str]) -> list[int]:
        """See `Subject.lengths`."""
        return [len(self._tokenizer.encode(f" {text}")) for text in texts]

    def sit(self, exams: Many[Exam], *, independent: bool, progress: Progress) -> list[Transcript]:
        """See `Subject.sit`."""
        with flushed_denormals():
            return self._drive([self._visit(exam, independent) for exam in exams], progress)

    # ---- one session ------------------------------------------------------------------------------------------------

    def _visit(self, exam: Exam, independent: bool) -> _Visit:
        memory: TurnResult | None = None
        replies: list[str] = []
        for text in exam.tellings:
            (told,) = yield [self._turn(memory, text, keep=True)]
            replies.append(told.text)
            memory = told.memory
        if exam.small_talk:
            messages = [_message(role, text) for pair in exam.small_talk for role, text in _roles(pair)]
            (heard,) = yield [
                self._sequence(memory, self._prompt(memory, messages, answer=False), READ_ONLY, keep=True)
            ]
            memory = heard.memory
        forced = yield [self._reference(memory, question) for question in exam.questions]
        guessed = yield [self._reference(None, question) for question in exam.questions]
        controls = yield [self._turn(None, question.text) for question in exam.questions]
        if independent:
            answers = yield [self._turn(memory, question.text) for question in exam.questions]
        else:
            answers = []
            for question in exam.questions:
                (answer,) = yield [self._turn(memory, question.text, keep=True)]
                answers.append(answer)
                memory = answer.memory
        return Transcript(
            tuple(replies),
            tuple(outcome.text for outcome in answers),
            tuple(outcome.text for outcome in controls),
            tuple(self._forced(*each) for each in zip(exam.questions, forced, guessed, strict=True)),
        )

    def _turn(self, memory: TurnResult | None, text: str, *, keep: bool = False) -> Sequence:
        return self._sequence(memory, self._prompt(memory, [_message("user", text)]), GREEDY, keep=keep)

    def _reference(self, memory: TurnResult | None, question: Question) -> Sequence:
        """The question with its reference answer, to be read with log-probabilities."""
        prompt = self._prompt(memory, [_message("user", question.text)], answer=False)
        return self._sequence(memory, prompt + self._answer(question)[0], FORCED)

    def _answer(self, question: Question) -> tuple[list[int], list[bool]]:
        """Tokens of the reference answer, and which of them belong to the value."""
        rendered = render_dialogue(Dialogue((question.reference,), ()), self._tokenizer)
        return rendered.tokens.tolist(), (rendered.weights >= Weights.value).tolist()

    def _forced(self, question: Question, taught: _Outcome, guessed: _Outcome) -> Forced | None:
        if question.kind == "unknown":
            return None
        _, of_value = self._answer(question)
        return Forced(_hits(taught, of_value), _hits(guessed, of_value))

    def _prompt(
        self, memory: TurnResult | None, messages: Iterable[Mapping[str, str]], answer: bool = True
    ) -> list[int]:
        """Tokens the memory has not read: what the last turn left, then what this one brings."""
        left = [] if memory is None or memory.pending is None else [memory.pending]
        if left and left != [self._tokenizer.end_id]:
            left.append(self._tokenizer.end_id)  # the last reply was cut short: close it
        return [*left, *self._tokenizer.render(messages, answer)]

    def _sequence(
        self, memory: TurnResult | None, prompt: list[int], params: SamplingParams, *, keep: bool = False
    ) -> Sequence:
        self._count += 1
        position, state = (memory.position, memory.state) if memory else (0, None)
        return Sequence(str(self._count), prompt, params, position=position, state=state, keep_state=keep)

    # ---- all sessions -----------------------------------------------------------------------------------------------

    def _drive(self, visits: list[_Visit], progress: Progress) -> list[Transcript]:
        """Run the visits side by side."""
        groups = {number: _Group(visit) for number, visit in enumerate(visits)}
        owner: dict[str, int] = {}
        done: dict[int, Transcript] = {}

        def advance(number: int) -> None:
            group = groups[number]
            outcomes = [group.outcomes[sequence.id] for sequence in group.sequences]
            try:
                group.sequences = group.visit.send(outcomes) if outcomes else next(group.visit)
            except StopIteration as end:
                done[number] = end.value
                progress(len(done), len(visits))
                return
            group.outcomes = {}
            for sequence in group.sequences:
                owner[sequence.id] = number
                self._engine.submit(sequence)

        for number in groups:
            advance(number)
        while self._engine.has_work:
            for event in self._engine.step():
                if event.finish is None:
                    continue
                number = owner.pop(event.sequence_id)
                self._finish(groups[number], event)
                if len(groups[number].outcomes) == len(groups[number].sequences):
                    advance(number)
        return [done[number] for number in groups]

    def _finish(self, group: _Group, event: TokenEvent) -> None:
        if event.error is not None:
            raise NestedError(f"model {self.name!r} failed: {event.error}") from event.error
        sequence = next(s for s in group.sequences if s.id == event.sequence_id)
        decoder = IncrementalDecoder(self._tokenizer)
        text = "".join(decoder.push(token) for token in sequence.output) + decoder.flush()
        group.outcomes[sequence.id] = _Outcome(text, event.result, event.prompt_logprobs or ())


def _hits(outcome: _Outcome, of_value: list[bool]) -> tuple[bool, ...]:
    """For the tokens of the value, which end the prompt: was each the likeliest one?"""
    end = outcome.logprobs[-len(of_value) :]
    return tuple(entry is not None and entry.rank == 1 for entry, of in zip(end, of_value, strict=True) if of)


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _roles(exchange: tuple[str, str]) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("user", exchange[0]), ("assistant", exchange[1])
