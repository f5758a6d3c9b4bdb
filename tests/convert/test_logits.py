"""Converted models compute what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nested_runtime.convert.levels import Stack
from nested_runtime.core import SamplingParams, Sequence
from nested_runtime.engine.engine import Engine
from nested_runtime.engine.runner import Span
from nested_runtime.models import loading

from .conftest import CASES

LENGTH = 40  # beyond every sliding window of the cases, and beyond the original length of the stretched ropes


def tokens_of(case: str) -> torch.Tensor:
    return torch.randint(3, 300, (2, LENGTH), generator=torch.Generator().manual_seed(len(case)))


STILL = Stack((8, 16), rank=4, blocks="last-half", rate=0.0)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("stack", [None, STILL], ids=["plain", "levels of step size 0"])
def test_logits_equal_transformers_at_once_and_token_by_token(
    stack: Stack | None, case: str, converted: Callable[..., Any]
) -> None:
    theirs, ours = converted(case, stack)
    tokens = tokens_of(case)
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours.model.logits(ours.model.scan(tokens, None, 0)[0])
    assert float((found - expected).abs().max()) <= 1e-4
    assert float(expected.std()) > 0.1, "the test would not notice anything"
    # Through the engine: the first 5 tokens as a prompt, then token by token, two sessions side by side.
    steps = stepwise(ours.model, tokens)
    assert float((steps - found).abs().max()) <= 1e-4


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("case", ["llama3", "mistral", "qwen3", "gemma3"])
def test_levels_move_the_logits_and_token_by_token_is_still_prefill(
    case: str, rank: int | None, converted: Callable[..., Any]
) -> None:
    theirs, ours = converted(case, Stack((8, 16), rank=rank, blocks="last-half", optimizer="gd", rate=0.02))
    tokens = tokens_of(case)
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours.model.logits(ours.model.scan(tokens, None, 0)[0])
    assert float((found[:, :8] - expected[:, :8]).abs().max()) <= 1e-4
    assert float((found[:, 8:] - expected[:, 8:]).abs().max()) > 1e-2
    steps = stepwise(ours.model, tokens)
    assert float((steps - found).abs().max()) <= 1e-4 * float(found.abs().max())


@pytest.mark.parametrize("case", ["llama3", "qwen2-yarn", "gemma3"])
def test_int8_weights_are_near_and_token_by_token_is_still_prefill(
    case: str, converted: Callable[..., Any], tmp_path: Path
) -> None:
    theirs, plain = converted(case, Stack((8,), rank=4, optimizer="gd", rate=0.02))
    ours = loading.load(str(tmp_path / case), int8=True)
    assert ours.fingerprint != plain.fingerprint
    assert not any("w_in" in name and "q" not in name for name, _ in ours.model.named_parameters())
    tokens = tokens_of(case)
    with torch.no_grad():
        expected = theirs(tokens).logits[:, :8]
        found = ours.model.logits(ours.model.scan(tokens, None, 0)[0])
    error = (found[:, :8] - expected).square().mean().sqrt() / expected.std()
    assert 1e-5 < float(error) < 0.05
    steps = stepwise(ours.model, tokens)
    assert float((steps - found).abs().max()) <= 1e-4 * float(found.abs().max())


def stepwise(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] by a pool of keys and values: 5 tokens at once, then one at a time."""
    engine = Engine(model, capacity=2)
    slots = [engine.pool.acquire() for _ in tokens]
    outs: list[list[torch.Tensor]] = [[] for _ in tokens]
    begin = 0
    for end in range(5, tokens.shape[1] + 1):
        if model.update_chunk and begin and begin % model.update_chunk == 0:
            kv = engine.pool.extend(slots, [0, 0])
            places = torch.tensor([begin, begin])
            assert model.update(torch.tensor(slots), tokens[:, begin], places, engine.pool.tensors, kv).good.all()
        spans = [
            Span(s, begin, row[begin:end].tolist(), range(end - begin)) for s, row in zip(slots, tokens, strict=True)
        ]
        read = engine.runner.step(spans)
        for out, rows in zip(outs, read.logits.tensor_split(read.ends[:-1]), strict=True):
            out.append(rows)
        begin = end
    return torch.stack([torch.cat(rows) for rows in outs])


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama3", "qwen2", "gemma3"])
def test_greedy_generation_equals_generate(case: str, converted: Callable[..., Any]) -> None:
    theirs, ours = converted(case)
    prompt = tokens_of(case)[0, :12]
    expected = theirs.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    engine = Engine(ours.model, capacity=2)
    sequence = Sequence("a", prompt.tolist(), SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    engine.submit(sequence)
    while engine.has_work:
        engine.step()
    assert sequence.tokens == expected[0].tolist()
