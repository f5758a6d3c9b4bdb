"""Matching of resent conversations, without a server."""

from __future__ import annotations

import pytest

from nested_runtime.errors import HistoryConflict, RequestError
from nested_runtime.sessions.history import Match, Record, Version, digests, match, root_of


def said(*texts: str) -> list[dict[str, str]]:
    """Alternating messages of user and assistant."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def record(*texts: str, start: int = 0) -> Record:
    messages = said(*texts)
    chain = digests(messages)
    return Record(root_of(messages, chain), chain[-1], len(chain), start)


ONE = Version(1, 0, record("a", "b"))
TWO = Version(2, 1, record("a", "b", "c", "d"))


def test_the_first_turn_is_new() -> None:
    assert match(said("a"), [], 0) == Match(0, 0, 0, "new")
    assert match(said("a", "b", "c"), [], 0) == Match(0, 0, 0, "new")


def test_only_the_question_is_new() -> None:
    assert match(said("x"), [TWO, ONE], 2) == Match(2, 0, 2, "new")
    assert match(said("a"), [TWO, ONE], 2) == Match(2, 0, 2, "new")


def test_the_conversation_goes_on() -> None:
    assert match(said("a", "b", "c", "d", "e"), [TWO, ONE], 2) == Match(2, 4, 0, "extended")
    assert match(said("a", " b\n", "c", "d ", "e"), [TWO, ONE], 2) == Match(2, 4, 0, "extended")


def test_new_says_what_it_says() -> None:
    assert match(said("a", "b", "c", "d", "e"), [TWO, ONE], 2, "new") == Match(2, 0, 2, "new")


@pytest.mark.parametrize("last", ["c", "C"])
def test_regenerate_and_edit(last: str) -> None:
    assert match(said("a", "b", last), [TWO, ONE], 2) == Match(1, 2, 0, "branched")


def test_an_edited_reply_goes_back_to_the_beginning() -> None:
    assert match(said("a", "B", "c"), [TWO, ONE], 2) == Match(0, 0, 0, "branched")
    assert match(said("a"), [TWO, ONE], 2, "resent") == Match(0, 0, 0, "branched")


def test_a_version_that_is_gone() -> None:
    later = Version(9, 8, record("a", "b", "c", "d", start=7))
    with pytest.raises(HistoryConflict, match=r"version 7.*no longer kept"):
        match(said("a", "b", "x"), [later], 9)


def test_another_conversation_is_not_forgotten_silently() -> None:
    other = Version(3, 2, record("x", "y", start=2))
    assert match(said("a", "b", "c", "d", "e"), [other, TWO, ONE], 3) == Match(3, 4, 0, "extended")
    with pytest.raises(HistoryConflict, match="version 3"):
        match(said("a", "b", "x"), [other, TWO, ONE], 3)
    learned = Version(3, 2, None)
    with pytest.raises(HistoryConflict, match="another conversation"):
        match(said("a", "b", "x"), [learned, TWO, ONE], 3)


def test_after_a_reset_everything_is_unread() -> None:
    reset = Version(3, 0, None)
    assert match(said("a", "b", "c", "d", "e"), [reset, TWO, ONE], 3) == Match(3, 0, 3, "new")


def test_a_branch_left_behind_can_be_taken_up_again() -> None:
    branch = Version(3, 1, record("a", "b", "C", "D"))
    assert match(said("a", "b", "c", "d", "e"), [branch, TWO, ONE], 3) == Match(2, 4, 0, "branched")
    assert match(said("a", "b", "C", "D", "e"), [branch, TWO, ONE], 3) == Match(3, 4, 0, "extended")


def test_a_system_prompt_alone_is_not_a_common_start() -> None:
    system = [{"role": "system", "content": "be kind"}]
    messages = system + said("a", "b")
    chain = digests(messages)
    one = Version(1, 0, Record(root_of(messages, chain), chain[-1], 3, 0))
    assert match(system + said("x", "y", "z"), [one], 1) == Match(1, 0, 1, "new")
    assert match(system + said("a", "b", "c"), [one], 1) == Match(1, 3, 0, "extended")
    assert match(said("a", "b", "c"), [one], 1) == Match(1, 0, 1, "new")


@pytest.mark.parametrize("texts", [("a", "b", "c", "d"), ("a", "b")])
def test_nothing_new(texts: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match="already answered"):
        match(said(*texts), [TWO, ONE], 2)


def test_roles_and_borders_are_part_of_the_chain() -> None:
    assert digests([{"role": "user", "content": "ab"}]) != digests([{"role": "assistant", "content": "ab"}])
    assert digests(said("ab", "c"))[-1] != digests(said("a", "bc"))[-1]
