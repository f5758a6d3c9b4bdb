"""The level clock, and the chain of static levels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nested_runtime.errors import ConfigError
from nested_runtime.memory.cms import ContinuumMemory, Level, LevelClock


@st.composite
def clocks(draw: st.DrawFn) -> LevelClock:
    """Levels whose chunks divide one another, with static ones among them."""
    chunk, levels = 1, []
    for i in range(draw(st.integers(0, 4))):
        chunk *= draw(st.integers(1, 4))
        levels.append(Level(str(i), 2, 0 if draw(st.booleans()) else chunk))
    return LevelClock(levels)


@given(clocks(), st.integers(0, 300))
def test_until_due_is_the_distance_to_the_first_due_position(clock: LevelClock, position: int) -> None:
    left = clock.until_due(position)
    if left is None:
        assert all(level.chunk == 0 for level in clock.levels)
        return
    assert left >= 1
    assert clock.due(position + left)
    assert not any(clock.due(p) for p in range(position + 1, position + left))


@given(clocks(), st.integers(1, 300))
def test_a_due_level_makes_every_faster_one_due(clock: LevelClock, position: int) -> None:
    due = clock.due(position)
    adaptive = [level for level in clock.levels if level.chunk]
    assert list(due) == adaptive[: len(due)]


@given(clocks(), st.integers(1, 300))
def test_each_level_is_due_once_in_its_chunk(clock: LevelClock, tokens: int) -> None:
    for level in clock.levels:
        count = sum(level in clock.due(p) for p in range(tokens + 1))
        assert count == (tokens // level.chunk if level.chunk else 0)


def test_nothing_is_due_before_the_first_token() -> None:
    assert LevelClock([Level("a", 2, 1)]).due(0) == ()


@pytest.mark.parametrize(
    ("levels", "named"),
    [
        ([Level("a", 2, 4), Level("b", 2, 6)], "chunk 4 does not divide the next level's chunk 6"),
        ([Level("slow", 2, 8), Level("fast", 2, 4)], "chunk 8 does not divide"),
        ([Level("odd", 2, -1)], r"levels\.odd\.chunk"),
    ],
)
def test_impossible_clocks_are_named(levels: list[Level], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        LevelClock(levels)


@pytest.mark.parametrize(
    ("levels", "named"),
    [
        ([], "levels is empty"),
        ([Level("thin", 0)], r"levels\.thin\.hidden must be at least 1, got 0"),
        ([Level("fast", 2, 16)], r"levels\.fast\.chunk is 16"),
    ],
)
def test_impossible_chains_are_named(levels: list[Level], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ContinuumMemory(4, levels)


def test_one_static_level_is_an_mlp_and_a_second_adds_to_it() -> None:
    torch.manual_seed(0)
    chain = ContinuumMemory(4, [Level("a", 6), Level("b", 3)])
    for p in chain.parameters():
        p.data.normal_()
    z = torch.randn(5, 4)
    first = (z @ chain.up[0].t()).relu() ** 2 @ chain.down[0].t()
    second = (first @ chain.up[1].t()).relu() ** 2 @ chain.down[1].t()
    torch.testing.assert_close(chain(z), first + second)
