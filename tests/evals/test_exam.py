"""Exams: reproducible, of the asked size, from the split, and never naming their own answers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nested_runtime.errors import ConfigError
from nested_runtime.evals.exam import Exam, Examiner, Plan
from nested_runtime.evals.invented import is_invented
from nested_runtime.evals.scoring import is_right, says_unknown
from nested_runtime.evals.wording import holds
from nested_runtime.train.dialogues import mentions, relations
from nested_runtime.train.values import CLOSED, split_of

PLANS = (
    Plan("one", 1),
    Plan("six", 6),
    Plan("far", 4, 300),
    Plan("twenty", 20),
    Plan("update", 6, 50, corrected=3),
    Plan("unknown", 5, untold=5),
    Plan("openvocab", 6, invented=True),
)
SEEDS = st.integers(0, 2**31)
CHATS = [("Do you like films?", "I do, the old ones."), ("How is the weather?", "It rains."), ("Rex barks.", "Oh.")]


def words(texts: Sequence[str]) -> list[int]:
    """Stands in for a tokenizer: half a word is a token."""
    return [2 * len(text.split()) for text in texts]


def examine(seed: int, plan: Plan, index: int = 0, split: str = "dev", chats: Sequence[tuple[str, str]] = ()) -> Exam:
    return Examiner(split, seed, words, chats).exam(plan, index)


@given(SEEDS, st.sampled_from(PLANS), st.sampled_from(["dev", "test"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_nothing_asked_or_said_in_between_names_a_value(seed: int, plan: Plan, split: str, with_chats: bool) -> None:
    exam = examine(seed, plan, split=split, chats=CHATS if with_chats else ())
    told = {value for question in exam.questions for value in question.told}
    texts = [question.text for question in exam.questions] + [text for pair in exam.small_talk for text in pair]
    assert not [(text, value) for text in texts for value in told if mentions(text.lower(), value.lower())]


@given(SEEDS, st.sampled_from(PLANS))
@settings(max_examples=60, deadline=None)
def test_every_answer_was_told_and_the_newest_came_last(seed: int, plan: Plan) -> None:
    exam = examine(seed, plan)
    assert len(exam.tellings) == plan.facts + plan.corrected
    for question in exam.questions:
        if question.kind == "unknown":
            assert not question.expected
            continue
        told = [i for i, text in enumerate(exam.tellings) if mentions(text.lower(), question.expected.lower())]
        assert told
        for old in question.outdated:
            first = next(i for i, text in enumerate(exam.tellings) if mentions(text.lower(), old.lower()))
            assert first < told[-1]


@given(SEEDS, st.sampled_from(PLANS))
@settings(max_examples=40, deadline=None)
def test_the_plan_is_kept(seed: int, plan: Plan) -> None:
    exam = examine(seed, plan)
    kinds = [question.kind for question in exam.questions]
    assert kinds.count("update") == plan.corrected
    assert kinds.count("recall") == plan.facts - plan.corrected
    assert kinds.count("unknown") <= plan.untold
    sizes = [sum(words(pair)) + 4 for pair in exam.small_talk]
    assert sum(sizes) >= plan.filler_tokens
    assert sum(sizes[:-1]) < max(1, plan.filler_tokens)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_values_belong_to_the_split(seed: int) -> None:
    for split in ("dev", "test"):
        for question in examine(seed, PLANS[1], split=split).questions:
            if question.value_kind in CLOSED:
                continue
            value = question.expected  # templates may have taken its article
            assert split in {split_of(text, "value") for text in (value, f"a {value}", f"an {value}")}


def test_phrasings_of_dev_and_test_are_never_trained_on() -> None:
    for relation in relations().values():
        for lists in (relation.tells, relation.asks, relation.corrections):
            texts = {split: {template.text for template in lists[split]} for split in ("train", "dev", "test")}
            if len(set.union(*texts.values())) >= 6:
                assert not texts["train"] & (texts["dev"] | texts["test"]), relation.name


@pytest.mark.parametrize(("split", "digest"), [("dev", "532e543c6fb3c39e"), ("test", "57bb204b2fe388b2")])
def test_exams_are_those_that_models_were_measured_with(split: str, digest: str) -> None:
    """Whoever changes them changes every figure of the model card: measure again, then write the new digest here."""
    exams = [examine(0, plan, index, split) for plan in PLANS for index in range(20)]
    asked = [(exam.tellings, [(q.text, q.expected) for q in exam.questions]) for exam in exams]
    assert hashlib.sha256(repr(asked).encode()).hexdigest()[:16] == digest


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_openvocab_values_are_invented_words_of_several_tokens(seed: int) -> None:
    def letters(texts: Sequence[str]) -> list[int]:
        return [len(text) // 4 for text in texts]

    exam = Examiner("dev", seed, letters).exam(PLANS[-1], 0)
    for question in exam.questions:
        assert is_invented(question.expected)
        assert letters([question.expected])[0] > 1


def test_too_many_facts_to_keep_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nested_runtime.evals.exam.TRIES", 2)
    with pytest.raises(ConfigError, match=r"200 facts .* fewer --facts"):
        examine(0, Plan("many", 200, invented=True))


def test_a_seed_and_an_index_give_one_exam_and_distance_changes_only_the_small_talk() -> None:
    near, far = examine(3, PLANS[1], 7), examine(3, replace(PLANS[1], filler_tokens=200), 7)
    assert near == examine(3, PLANS[1], 7)
    assert near != examine(4, PLANS[1], 7)
    assert near != examine(3, PLANS[1], 8)
    assert far.small_talk
    assert replace(far, small_talk=()) == near


@given(SEEDS, st.sampled_from(PLANS))
@example(962276, PLANS[5])  # "color" is told, and a denial says "what color"
@settings(max_examples=40, deadline=None)
def test_the_answers_of_training_are_right(seed: int, plan: Plan) -> None:
    for question in examine(seed, plan).questions:
        assert is_right(question, question.reference.content)
        assert says_unknown(question.reference.content) == (question.kind == "unknown")
        if question.outdated:
            assert not is_right(question, f"{question.reference.content} Not {question.outdated[0]}.")
        if question.expected:
            assert not is_right(question, "You have not told me.")


@pytest.mark.parametrize(
    ("answer", "value", "held"),
    [
        ("Your dog is called Rex.", "rex", True),
        ("Your dog is called Rexford.", "Rex", False),
        ("You have the green boat.", "a green boat", True),
        ("It costs $40.", "$40", True),
        ("It costs $400.", "$40", False),
        ("It is  half\npast two", "half past two", True),
        ("It is the dog’s bowl", "dog's bowl", True),
        ("", "Rex", False),
    ],
)
def test_a_value_is_held_as_whole_words(answer: str, value: str, held: bool) -> None:
    assert holds(answer, value) is held


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("You have not told me your name.", True),
        ("You haven’t told me that", True),
        ("i don't know where you live.", True),
        ("I do not know.", True),
        ("Sorry, you never told me.", True),
        ("Your name is Anna.", False),
        ("I know where you live.", False),
        ("You told me not to say it.", False),
    ],
)
def test_says_unknown(answer: str, says: bool) -> None:
    assert says_unknown(answer) is says


def test_never_told_is_wrong_when_a_told_value_comes_along() -> None:
    question = next(q for q in examine(1, PLANS[5]).questions if q.kind == "unknown")
    assert is_right(question, "You have not told me that.")
    assert not is_right(question, f"You have not told me that, but {question.told[0]}.")
    assert not re.search("x{9}", question.text)
