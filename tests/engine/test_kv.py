"""Keys and values in the engine: admission when blocks run out, and what a session keeps between turns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nested_runtime.core import SamplingParams, Sequence, TokenEvent
from nested_runtime.engine.engine import Engine
from nested_runtime.errors import ContextOverflow
from nested_runtime.models.base import LanguageModel
from nested_runtime.state.blocks import BLOCK
from nested_runtime.state.spec import newest_rows

BuildModel = Callable[[str, torch.dtype], LanguageModel]


@pytest.fixture(scope="module")
def model(build_model: BuildModel) -> LanguageModel:
    """Attention over 24 tokens, so a session holds at most 24 rows and the 32 of a step: 5 blocks."""
    return build_model("hope-attention", torch.float64)


def make_engine(model: LanguageModel, blocks: int) -> Engine:
    row = sum(s.num_bytes // s.shape[0] for s in model.state_spec()) * 2  # float64
    return Engine(model, capacity=4, max_batch_tokens=32, kv_bytes=blocks * BLOCK * row)


def turn(name: str, tokens: int, max_tokens: int = 4) -> Sequence:
    prompt = [(7 * i + len(name)) % 40 for i in range(tokens)]
    return Sequence(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0), keep_state=True)


def drain(engine: Engine) -> tuple[list[TokenEvent], int]:
    """All events, and how many sequences ran at the same time at most."""
    events, most = [], 0
    while engine.has_work:
        events += engine.step()
        most = max(most, int(engine.stats()["running"]))
        engine.pool.check_integrity(deep=True)
    return events, most


@pytest.mark.parametrize(("blocks", "at_once"), [(2, 1), (4, 2), (20, 4)])
def test_who_finds_no_blocks_waits_and_nobody_fails(model: LanguageModel, blocks: int, at_once: int) -> None:
    engine = make_engine(model, blocks)
    for name in "abcd":
        engine.submit(turn(name, 13))  # 17 rows at the end
    events, most = drain(engine)
    assert most == at_once
    results = [event.result for event in events if event.finish is not None]
    assert len(results) == 4
    assert all(result is not None and result.position == 16 for result in results)
    assert engine.stats()["kv_blocks_free"] == engine.stats()["kv_blocks"] == min(blocks, 20)


def test_a_turn_that_fits_nowhere_is_refused_at_once(model: LanguageModel) -> None:
    engine = make_engine(model, 2)
    with pytest.raises(ContextOverflow, match=r"keys and values of 54 tokens .* kv_bytes"):
        engine.submit(turn("long", 50))
    assert not engine.has_work


def test_kept_rows_are_the_newest_that_fit(model: LanguageModel) -> None:
    engine = make_engine(model, 20)
    engine.submit(turn("a", 13))
    result = drain(engine)[0][-1].result
    assert result is not None
    specs = engine.specs
    row_bytes = sum(s.num_bytes // s.shape[0] for s in specs)
    assert newest_rows(specs, result.state, 16 * row_bytes) is result.state
    cut = newest_rows(specs, result.state, 5 * row_bytes + 1)
    assert all(torch.equal(tensor, result.state[name][-5:]) for name, tensor in cut.items())
    assert {len(tensor) for tensor in newest_rows(specs, result.state, 0).values()} == {0}


def test_a_session_without_its_keys_reads_like_a_fresh_one_anywhere(model: LanguageModel) -> None:
    """Scores depend on distances only, so a conversation may begin at any session position."""
    engine = make_engine(model, 20)
    fresh, later = turn("a", 13), turn("b", 13)
    later.prompt, later.position = list(fresh.prompt), 100_003
    later.state = {s.name: torch.zeros(s.fresh_shape, dtype=s.dtype) for s in engine.specs}
    engine.submit(fresh)
    engine.submit(later)
    drain(engine)
    assert fresh.output == later.output


@pytest.mark.parametrize("kept", [0, 3])
def test_levels_outlive_the_keys_and_values_that_are_not_kept(kept: int, build_model: BuildModel) -> None:
    """A state cut in the middle of a chunk goes on: the levels step at the chunk's end, however it is scheduled."""
    model = build_model("hope-attention+stacked", torch.float64)
    first = Engine(model, capacity=1)
    first.submit(turn("a", 11))  # 14 tokens in the state, chunks of 4
    result = drain(first)[0][-1].result
    assert result is not None
    row = sum(s.num_bytes // s.shape[0] for s in first.specs if s.grows)
    cut = newest_rows(first.specs, result.state, kept * row + row // 2)
    assert {len(cut[s.name]) for s in first.specs if s.grows} == {kept}
    assert all(cut[s.name] is result.state[s.name] for s in first.specs if not s.grows)
    assert int(cut["chunk.count"]) == 2
    after = []
    for budget, others in ((32, 0), (2, 0), (32, 2)):
        engine = Engine(model, capacity=3, max_batch_tokens=budget)
        later = turn("b", 9)
        later.position, later.state = result.position, cut
        engine.submit(later)
        for n in range(others):
            engine.submit(turn("other" * (n + 1), 7 + n))
        ends = {event.sequence_id: event for event in drain(engine)[0] if event.finish is not None}
        assert ends["b"].error is None
        after.append(ends["b"].result)
        assert after[-1] is not None
        assert (after[-1].updates, after[-1].refused) == (3, 0)  # at 16, 20 and 24 of 26
    for other in after[1:]:
        for name, tensor in after[0].state.items():
            torch.testing.assert_close(other.state[name], tensor, rtol=0.0, atol=1e-10, msg=lambda m, n=name: n + m)
