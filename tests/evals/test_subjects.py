"""The two subjects over the same tiny model: in process and through a real server, answer for answer the same."""

from __future__ import annotations

import httpx
import pytest

from nested_runtime.core import SamplingParams, Sequence
from nested_runtime.engine.engine import Engine
from nested_runtime.evals.exam import Exam, Examiner, Plan
from nested_runtime.evals.in_process import InProcess
from nested_runtime.evals.over_http import OverHttp, connect
from nested_runtime.evals.subject import MAX_TOKENS, Transcript
from nested_runtime.models.loading import LoadedModel

PLAN = Plan("small", 2, 40, untold=1)


def exams_of(subject: InProcess | OverHttp, count: int = 2) -> list[Exam]:
    examiner = Examiner("dev", 5, subject.lengths)
    return [examiner.exam(PLAN, index) for index in range(count)]


def sit(subject: InProcess | OverHttp, exams: list[Exam], independent: bool = True) -> list[Transcript]:
    seen: list[tuple[int, int]] = []
    scripts = subject.sit(exams, independent=independent, progress=lambda *at: seen.append(at))
    assert seen == [(n, len(exams)) for n in range(1, len(exams) + 1)]
    return scripts


def test_transcripts_are_whole_and_companions_change_nothing(loaded: LoadedModel) -> None:
    subject = InProcess(loaded, slots=4)
    exams = exams_of(subject)
    together = sit(subject, exams)
    alone = [sit(InProcess(loaded, slots=1), [exam])[0] for exam in exams]
    assert together == alone
    for exam, script in zip(exams, together, strict=True):
        assert len(script.replies) == len(exam.tellings)
        assert len(script.answers) == len(script.controls) == len(script.forced) == len(exam.questions)
        assert any(script.replies)
        for question, forced in zip(exam.questions, script.forced, strict=True):
            sizes = subject.lengths([question.expected])[0]
            assert (forced is None) == (question.kind == "unknown")
            assert forced is None or len(forced.hits) == len(forced.control) == sizes


def greedy(loaded: LoadedModel, tokens: list[int]) -> list[int]:
    """The reply to a whole conversation read from the start: what a session must come to as well."""
    engine = Engine(loaded.model, end_tokens=(loaded.tokenizer.end_id,))
    sequence = Sequence("one", tokens, SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0))
    engine.submit(sequence)
    while engine.has_work:
        engine.step()
    return sequence.output


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_questions_meet_the_memory_that_teaching_left(loaded: LoadedModel) -> None:
    subject = InProcess(loaded)
    exam = exams_of(subject, 1)[0]
    script = sit(subject, [exam])[0]
    tokenizer = loaded.tokenizer
    tokens: list[int] = []
    for text, reply in zip(exam.tellings, script.replies, strict=True):
        tokens += tokenizer.render([user(text)])
        said = greedy(loaded, tokens)
        assert tokenizer.decode(said).removeprefix(" ") == reply
        tokens += [*said, *([] if said[-1] == tokenizer.end_id else [tokenizer.end_id])]
    for heard, answered in exam.small_talk:
        tokens += tokenizer.render([user(heard), {"role": "assistant", "content": answered}], False)
    for question, answer, control in zip(exam.questions, script.answers, script.controls, strict=True):
        asked = tokenizer.render([user(question.text)])
        assert tokenizer.decode(greedy(loaded, tokens + asked)).removeprefix(" ") == answer
        assert tokenizer.decode(greedy(loaded, asked)).removeprefix(" ") == control


def test_in_turn_the_answers_enter_the_memory(loaded: LoadedModel) -> None:
    subject = InProcess(loaded)
    exams = exams_of(subject)
    apart, in_turn = sit(subject, exams), sit(subject, exams, independent=False)
    assert [script.answers[0] for script in apart] == [script.answers[0] for script in in_turn]
    assert [script.answers for script in apart] != [script.answers for script in in_turn]
    assert [script.controls for script in apart] == [script.controls for script in in_turn]


@pytest.mark.parametrize("independent", [True, False])
def test_a_server_answers_as_the_checkpoint_does(loaded: LoadedModel, server_url: str, independent: bool) -> None:
    here = InProcess(loaded)
    exams = exams_of(here)
    with connect(f"{server_url}/v1", connections=4) as there:
        assert (there.name, there.fingerprint) == (here.name, here.fingerprint)
        assert exams_of(there) == exams
        scripts = sit(there, exams, independent)
    for mine, theirs in zip(sit(here, exams, independent), scripts, strict=True):
        assert (mine.replies, mine.answers, mine.controls) == (theirs.replies, theirs.answers, theirs.controls)
        assert set(theirs.forced) == {None}
    left = httpx.get(f"{server_url}/v1/sessions").json()["data"]
    assert not [session["id"] for session in left if session["id"].startswith("eval-")]
