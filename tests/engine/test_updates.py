"""Update jobs: a chunk's gradient in pieces, sessions that wait, and those that must not wait for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nested_runtime.core import SamplingParams, Sequence
from nested_runtime.engine.engine import Engine
from nested_runtime.errors import ConfigError
from nested_runtime.models.base import LanguageModel

BuildModel = Callable[[str, torch.dtype], LanguageModel]


def ask(name: str, length: int, max_tokens: int) -> Sequence:
    prompt = torch.randint(0, 40, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Sequence(
        name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True), keep_state=True
    )


def test_pieces_end_with_a_small_one_and_only_where_tokens_are_independent(build_model: BuildModel) -> None:
    assert build_model("hope+pieces", torch.float64).pieces == (12, 16)
    assert build_model("hope+sequential", torch.float64).pieces == (4,), "a memory follows the first adaptive level"


def test_gradients_of_pieces_add_up_to_that_of_the_chunk(build_model: BuildModel) -> None:
    model = build_model("hope+pieces", torch.float64).requires_grad_(False)
    tokens = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(3))
    _, state = model.scan(tokens, None, 0)
    pool = {name: torch.cat([torch.zeros_like(t[:1]), t]) for name, t in state.items()}
    slots, following = torch.tensor([1, 2]), torch.tensor([5, 6])
    whole = model.gradients(slots, 0, 16, following, pool)
    first = model.gradients(slots, 0, 12, pool["chunk.tokens"][slots, 12], pool)
    second = model.gradients(slots, 12, 16, following, pool)
    assert whole.keys() == first.keys()
    for name, tensor in whole.items():
        assert tensor.abs().max() > 1e-6, name
        torch.testing.assert_close(first[name] + second[name], tensor, rtol=0, atol=1e-12)
    left = {name: t.clone() for name, t in pool.items()}
    positions = torch.tensor([48, 48])
    given = model.update(slots, following, positions, left, None, whole)
    alone = model.update(slots, following, positions, pool)
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(given.tensors[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 1e9])
def test_a_long_update_does_not_stop_those_who_decode(build_model: BuildModel, share: float) -> None:
    """With no time for it the reader's work is done piece by piece, one between two steps; nobody misses a step."""
    model = build_model("hope+pieces", torch.float64)
    engine = Engine(model, capacity=2, update_share=share)
    engine.submit(ask("writer", 1, 12))
    while not any(event.token is not None for event in engine.step()):
        pass
    engine.submit(ask("reader", 33, 1))
    steps_of_reader, pieces = 0, []
    study = engine.updates._study
    engine.updates._study = lambda jobs: (pieces.append([job.sequence.id for job in jobs]), study(jobs))[1]  # type: ignore[method-assign]
    while "reader" in engine._jobs:
        before = len(pieces)
        tokens = [event.sequence_id for event in engine.step() if event.token is not None]
        assert "writer" in tokens
        assert len(pieces) - before <= 1 or share
        steps_of_reader += 1
    assert pieces.count(["reader"]) == 4, "two chunks of two pieces"
    assert steps_of_reader <= 6


def test_with_time_the_pieces_are_done_before_the_chunk_is_full(build_model: BuildModel) -> None:
    engine = Engine(build_model("hope+pieces", torch.float64), capacity=2, update_share=1e9)
    engine.submit(ask("a", 3, 20))
    while engine.has_work:
        engine.step()
        job = engine._jobs.get("a")
        if job is not None and job.filled == 14:
            assert job.studied == 12
            return
    raise AssertionError("the session never stood at token 14")


def test_an_impossible_share_is_named(build_model: BuildModel) -> None:
    for share in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"update_share must be a number, 0 or more, got {share}"):
            Engine(build_model("hope+pieces", torch.float64), capacity=1, update_share=share)
