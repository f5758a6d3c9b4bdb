"""Decode graphs with a real model: padding, buffers, sizes. Without a GPU the step is repeated instead of replayed."""

from __future__ import annotations

import pytest
import torch

from nested_runtime.core import SamplingParams, Sequence
from nested_runtime.engine.engine import Engine
from nested_runtime.engine.graphs import DecodeGraphs, Step, cuda_capture, graph_sizes
from nested_runtime.errors import ConfigError
from nested_runtime.models.hope import Hope
from nested_runtime.models.transformer import Transformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def repeat(step: Step) -> Step:
    """What a graph does, without one: its output stays at one address."""
    out = step()
    return lambda: out.copy_(step())


def run(engine: Engine) -> dict[str, tuple[list[int], dict[str, torch.Tensor]]]:
    """Three ragged sequences that end at different steps: tokens and states."""
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (9, 4, 14)]
    asked = [Sequence(str(i), list(range(1, 3 + i)), p, keep_state=True) for i, p in enumerate(params)]
    for sequence in asked:
        engine.submit(sequence)
    found = {}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            if event.result is not None:
                found[event.sequence_id] = dict(event.result.state)
    engine.pool.check_integrity(deep=True)
    return {s.id: (s.output, found[s.id]) for s in asked}


def engine_of(model: Hope, *, with_graphs: bool) -> Engine:
    engine = Engine(model, capacity=3, device=DEVICE)
    engine.runner.graphs = None
    if with_graphs:
        capture = cuda_capture if DEVICE == "cuda" else repeat
        forward = engine.runner.model
        engine.runner.graphs = DecodeGraphs(
            lambda batch: forward(batch, engine.pool.tensors), 3, engine.pool.device, capture
        )
    return engine


def test_graphs_change_no_token_and_no_state() -> None:
    torch.manual_seed(0)
    model = Hope.from_config(Hope.TINY).to(DEVICE)
    with_graphs = engine_of(model, with_graphs=True)
    found, expected = run(with_graphs), run(engine_of(model, with_graphs=False))
    assert with_graphs.runner.graphs is not None
    assert with_graphs.runner.graphs.num_captured == 3, "batches of 3, 2 and 1"
    for name, (tokens, state) in expected.items():
        assert found[name][0] == tokens
        for key, tensor in state.items():
            torch.testing.assert_close(found[name][1][key], tensor, rtol=1e-4, atol=1e-5)


def test_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    with pytest.raises(ConfigError, match="at least 1 sequence, got 0"):
        DecodeGraphs(lambda batch: batch.token_ids, 0, torch.device("cpu"))


def test_which_models_are_captured() -> None:
    """Levels and the transformer's ring look at their batch on the host; on a CPU nothing is captured at all."""
    assert Hope.from_config(Hope.TINY).is_capturable
    level = {"chunk": 4, "hidden": 4}
    assert not Hope.from_config({**Hope.TINY, "levels": [level]}).is_capturable
    assert not Transformer.from_config(Transformer.TINY).is_capturable
    if DEVICE == "cpu":
        assert Engine(Hope.from_config(Hope.TINY), capacity=2).runner.graphs is None


def test_a_prefill_and_a_larger_batch_are_no_decode_steps() -> None:
    graphs = DecodeGraphs(lambda batch: batch.token_ids, 2, torch.device("cpu"), repeat)
    batch = graphs._padding(3)
    assert graphs.fits(batch)
    with pytest.raises(ConfigError, match="a decode batch of 3 is over the largest graph, 2"):
        graphs.run(batch)
    batch.longest = 2
    assert not graphs.fits(batch)
