"""Sampling: distributions against closed forms, edits against their definitions, companions without influence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.core import SamplingParams
from nested_runtime.errors import RequestError
from nested_runtime.sampling import Chooser, _truncate, choose, token_logprobs, validate

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.4, -1.0, -3.0])
VOCAB = len(LOGITS)


def kept_by_definition(weights: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Written from the definitions, one token at a time."""
    p: list[float] = weights.tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = [i for i in order if p[i] >= params.min_p * max(p)]
    kept = kept[: params.top_k] if params.top_k else kept
    total, mass, nucleus = sum(p[i] for i in kept), 0.0, []
    for i in kept:
        if nucleus and params.top_p < 1 and mass / total >= params.top_p:
            break
        nucleus.append(i)
        mass += p[i]
    result = torch.zeros_like(weights)
    result[nucleus] = weights[nucleus]
    return result


def expected_distribution(params: SamplingParams) -> torch.Tensor:
    kept = kept_by_definition((LOGITS.double() / params.temperature).softmax(0), params)
    return kept / kept.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.7},
        {"top_p": 0.0},
        {"min_p": 0.2},
        {"top_k": 4, "top_p": 0.9, "min_p": 0.1, "temperature": 1.5},
    ],
    ids=str,
)
def test_samples_follow_the_closed_form(options: dict[str, Any]) -> None:
    params = SamplingParams(**{"seed": 11, **options})
    count = 6000
    chooser = Chooser(params)
    tokens = choose(LOGITS.expand(count, VOCAB), [chooser] * count)
    found = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double() / count
    expected = expected_distribution(params)
    assert torch.equal(found > 0, (expected > 0) & (found > 0)), "a dropped token was sampled"
    # five standard deviations of a binomial
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-12).all()


@pytest.mark.parametrize("top_k", [0, 3, 64, 100, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("sharpness", [0.1, 3.0])
def test_truncation_of_a_larger_vocabulary(top_k: int, top_p: float, min_p: float, sharpness: float) -> None:
    """Flat and sharp distributions over more tokens than are looked at first, in one batch with an easy row."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(3)) * sharpness
    weights = logits.double().softmax(0)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    (found, _) = _truncate(torch.stack([weights, weights]), [params, SamplingParams(top_k=1)])
    assert torch.equal(found, kept_by_definition(weights, params))


def test_greedy_takes_the_first_maximum_and_needs_no_generator() -> None:
    logits = torch.tensor([[0.0, 7.0, 7.0], [1.0, 0.0, 1.0]])
    params = SamplingParams(temperature=0.0)
    assert choose(logits, [Chooser(params), Chooser(params)]) == [1, 0]


def test_tiny_temperature_is_greedy_and_stays_finite() -> None:
    params = SamplingParams(temperature=1e-300, seed=1)
    assert choose(LOGITS[None] * 1e30, [Chooser(params)]) == [0]


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, 2**63, 123])
def test_equal_seeds_give_equal_tokens(seed: int) -> None:
    def run() -> list[int]:
        chooser = Chooser(SamplingParams(temperature=2.0, seed=seed))
        return [choose(LOGITS[None], [chooser])[0] for _ in range(20)]

    assert run() == run()


def test_without_seed_runs_differ() -> None:
    def run() -> list[int]:
        chooser = Chooser(SamplingParams(temperature=5.0))
        return [choose(LOGITS[None], [chooser])[0] for _ in range(64)]

    assert run() != run()


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 0, 2, 6]),
    top_p=st.sampled_from([1.0, 1.0, 1.0, 0.6]),
    min_p=st.sampled_from([0.0, 0.0, 0.0, 0.3]),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=2),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.sampled_from([(), (1,), (0, 2)]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=5), st.integers(0, 10_000))
def test_companions_change_nothing(params: list[SamplingParams], seed: int) -> None:
    steps = torch.randn(4, len(params), VOCAB, generator=torch.Generator().manual_seed(seed))
    together = [Chooser(p, [0, 1], end_tokens=(3,)) for p in params]
    batched = [choose(logits, together) for logits in steps]
    for row, p in enumerate(params):
        chooser = Chooser(p, [0, 1], end_tokens=(3,))
        assert [choose(logits[row : row + 1], [chooser])[0] for logits in steps] == [tokens[row] for tokens in batched]


def edited(params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    chooser = Chooser(params, prompt, end_tokens=(5,))
    for token in output:
        chooser.accept(token)
    row = LOGITS.clone()
    chooser.edit(row)
    return row.tolist()


def test_penalties_and_bias_follow_their_definitions() -> None:
    counted = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert edited(counted, [0], [1, 1, 4]) == [2.0, 1.0 - 0.5 - 0.5, *LOGITS.tolist()[2:4], -1.0 - 0.75, -3.0]
    repeated = SamplingParams(repetition_penalty=2.0)
    assert edited(repeated, [0], [4, 4]) == [1.0, 1.0, *LOGITS.tolist()[2:4], -2.0, -3.0]
    assert edited(SamplingParams(logit_bias={2: 10.0, 0: -1.0}), [], []) == [1.0, 1.0, 10.5, *LOGITS.tolist()[3:]]


def test_ends_are_suppressed_until_min_tokens() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(0,))
    assert edited(params, [], [1])[0] == edited(params, [], [1])[5] == -math.inf
    assert edited(params, [], [1, 1]) == LOGITS.tolist()


def test_choose_leaves_the_logits_as_they_are() -> None:
    logits = LOGITS[None].clone()
    choose(logits, [Chooser(SamplingParams(logit_bias={0: 5.0}, top_k=2))])
    assert torch.equal(logits, LOGITS[None])


def test_logprobs_are_the_raw_distribution() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    first, none, last = token_logprobs(logits, [1, 0, 0], [2, None, 0])
    raw = LOGITS.log_softmax(0).tolist()
    assert none is None
    assert first is not None
    assert last is not None
    assert (first.token, first.rank) == (1, 2)
    assert first.logprob == pytest.approx(raw[1])
    assert first.top == (pytest.approx((0, raw[0])), pytest.approx((1, raw[1])))
    assert (last.rank, last.top) == (1, ())
    full = token_logprobs(logits, [1, 1, 1], [99, 1, 1])[0]
    assert full is not None
    assert len(full.top) == VOCAB


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("min_tokens", 300),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2.0),
        ("presence_penalty", 3.0),
        ("repetition_penalty", 0.0),
        ("logprobs", -1),
        ("stop_token_ids", (VOCAB,)),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {0: math.inf}),
    ],
)
def test_validate_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        validate(dataclasses.replace(SamplingParams(), **{field: value}), VOCAB)
    assert caught.value.param == field
    validate(SamplingParams(), VOCAB)
