"""Levels in a model: the step is the gradient of the chunk from its start, for any split, companions, variant."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from nested_runtime.core import Batch
from nested_runtime.errors import ConfigError, StateError
from nested_runtime.memory.cms import VARIANTS
from nested_runtime.models.base import LanguageModel
from nested_runtime.registry import FAMILIES, OPTIMIZERS
from nested_runtime.state.pool import SlotPool

MakeModel = Callable[..., LanguageModel]
EXAMPLES = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
EXACT = {"rtol": 0.0, "atol": 1e-9}
LEVELS = [
    {"chunk": 4, "hidden": 6, "rate": 0.05, "optimizer": "momentum", "rank": 2},
    {"chunk": 8, "hidden": 6, "rate": 0.03, "rank": 2},
]


def of_variant(variant: str, levels: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """Stacked levels have the static MLP's width."""
    return [{**level, **fields, **({"hidden": None} if variant == "stacked" else {})} for level in levels]


SETUPS = [
    {"family": family, "cms": variant, "adaptive_blocks": blocks, "levels": of_variant(variant, LEVELS, rank=rank)}
    for family, variant, (blocks, rank) in itertools.product(("hope", "hope-attention"), VARIANTS, [(1, None), (2, 2)])
    if family == "hope" or variant in ("sequential", "stacked")
]


def name_of(setup: dict[str, Any]) -> str:
    kind = "dense" if setup["levels"][0]["rank"] is None else "rank"
    return f"{setup['family']}-{setup['cms']}-{setup['adaptive_blocks']}-{kind}"


@pytest.fixture(params=SETUPS, ids=name_of)
def setup(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def draw_tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def read_in_pool(model: LanguageModel, texts: list[torch.Tensor], data: st.DataObject) -> tuple[list[Any], list[Any]]:
    """Hidden states and states of sessions read side by side in packed steps of drawn lengths, as the engine may."""
    store = SlotPool(tuple(replace(s, dtype=wide(s.dtype)) for s in model.state_spec()), 2 * len(texts))
    slots = [store.acquire() for _ in range(2 * len(texts))][::2]
    pool = store.tensors
    done, outs = [0] * len(texts), [[] for _ in texts]
    while left := [i for i, text in enumerate(texts) if done[i] < len(text)]:
        picked = data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True), "who")
        counts = {}
        for i in picked:
            if int(pool["chunk.count"][slots[i]]) == model.update_chunk:
                kv = store.extend([slots[i]], [0])
                model.update(torch.tensor([slots[i]]), texts[i][done[i]][None], torch.tensor([done[i]]), pool, kv)
            room = model.update_chunk - int(pool["chunk.count"][slots[i]])
            counts[i] = data.draw(st.integers(1, min(room, len(texts[i]) - done[i])), "tokens")
        kv = store.extend([slots[i] for i in counts], list(counts.values()))
        with torch.inference_mode():
            hidden = model(
                Batch(
                    torch.cat([texts[i][done[i] : done[i] + n] for i, n in counts.items()]),
                    torch.tensor([0, *itertools.accumulate(counts.values())], dtype=torch.int32),
                    torch.tensor([slots[i] for i in counts], dtype=torch.int32),
                    torch.tensor([done[i] for i in counts]),
                    kv,
                ),
                pool,
            )
        for (i, n), piece in zip(counts.items(), torch.split(hidden, list(counts.values())), strict=True):
            outs[i].append(piece)
            done[i] += n
    store.check_integrity(deep=True)
    return [torch.cat(o) for o in outs], [{n: t[None] for n, t in store.save(s).items()} for s in slots]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


@EXAMPLES
@given(st.integers(0, 2**31), st.lists(st.integers(1, 22), min_size=1, max_size=3), st.data())
def test_packed_steps_and_updates_equal_scan(
    setup: dict[str, Any], make_model: MakeModel, seed: int, lengths: list[int], data: st.DataObject
) -> None:
    model = make_model(**setup).requires_grad_(False)
    texts = [draw_tokens(seed + i, n) for i, n in enumerate(lengths)]
    for text, hidden, state in zip(texts, *read_in_pool(model, texts, data), strict=True):
        expected, new = model.scan(text[None], None, 0)
        torch.testing.assert_close(hidden, expected[0], **EXACT)
        assert_same(state, new)


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 22), st.lists(st.integers(1, 21), max_size=4))
def test_scan_of_any_split_equals_the_whole(
    setup: dict[str, Any], make_model: MakeModel, seed: int, length: int, cuts: list[int]
) -> None:
    model, tokens = make_model(**setup).requires_grad_(False), draw_tokens(seed, 2, length)
    state, outs, begin = None, [], 0
    for end in sorted({*(c for c in cuts if c < length), length}):
        out, state = model.scan(tokens[:, begin:end], state, begin)
        outs.append(out)
        begin = end
    expected, whole = model.scan(tokens, None, 0)
    torch.testing.assert_close(torch.cat(outs, 1), expected, **EXACT)
    assert state is not None
    assert_same(state, whole)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("setup", SETUPS[:8], ids=name_of)
def test_every_family_takes_levels(family: str, setup: dict[str, Any], make_model: MakeModel) -> None:
    model, tokens = make_model(**{**setup, "family": family}).requires_grad_(False), draw_tokens(0, 2, 21)
    expected, whole = model.scan(tokens, None, 0)
    _, state = model.scan(tokens[:, :13], None, 0)
    out, state = model.scan(tokens[:, 13:], state, 13)
    torch.testing.assert_close(out, expected[:, 13:], **EXACT)
    assert_same(state, whole)
    assert whole["cms.1.clock"].tolist() == [[0, 5, 0]] * 2  # the chunk that ends at 20 was closed by token 21
    assert whole["cms.2.clock"].tolist() == [[4, 2, 0]] * 2


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_optimizer_steps_levels(optimizer: str, make_model: MakeModel) -> None:
    levels = [{"chunk": 4, "hidden": 6, "rate": 0.05, "optimizer": optimizer}]
    model, tokens = make_model("hope", levels=levels).requires_grad_(False), draw_tokens(0, 2, 21)
    expected, whole = model.scan(tokens, None, 0)
    _, state = model.scan(tokens[:, :11], None, 0)
    out, state = model.scan(tokens[:, 11:], state, 11)
    torch.testing.assert_close(out, expected[:, 11:], **EXACT)
    assert_same(state, whole)
    alone, _ = model.scan(tokens[1:], None, 0)
    torch.testing.assert_close(alone[0], expected[1], **EXACT)
    assert all(whole[name].any() for name in whole if ".delta." in name)


def test_a_step_follows_the_gradient_of_the_chunk_from_its_start(setup: dict[str, Any], make_model: MakeModel) -> None:
    """Oracle: each chunk read whole by `scan` from the state at its start, with gradients to the deltas in it."""
    torch.manual_seed(0)
    setup["levels"] = [{**level, "optimizer": "gd", "max_step": 1e6, "max_norm": 1e6} for level in setup["levels"]]
    model, tokens = make_model(**setup).requires_grad_(False), draw_tokens(3, 1, 17)
    state: dict[str, torch.Tensor] | None = None
    sums: dict[str, torch.Tensor] = {}
    for begin in range(0, 16, 4):
        if state is None:
            state = {s.name: torch.zeros(1, *s.fresh_shape, dtype=wide(s.dtype)) for s in model.state_spec()}
        leaves = {n: t.detach().clone().requires_grad_() for n, t in state.items() if ".delta." in n}
        hidden, after = model.scan(tokens[:, begin : begin + 4], {**state, **leaves}, begin)
        loss = cross_entropy(model.logits(hidden[0]), tokens[0, begin + 1 : begin + 5], reduction="sum")
        for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            sums[name] = sums.get(name, 0.0) + g
        state = {n: t.detach() for n, t in after.items()}
        for number, every in ((1, 4), (2, 8)):
            if (begin + 4) % every == 0:
                step(model, state, sums, number)
                if setup["cms"] == "nested" and number == 2:
                    for name in [n for n in state if ".cms.1.delta" in n]:
                        state[name] = state[name.replace(".cms.1.", ".cms.2.")].clone()
        for name in [n for n in state if n.startswith("chunk.")]:
            state[name] = torch.zeros_like(state[name])
    _, found = model.scan(tokens, None, 0)
    for name in [n for n in found if ".delta." in n]:
        assert found[name].abs().max() > 1e-7, f"{name} has not moved"  # 1,000 times what may differ
        torch.testing.assert_close(found[name], state[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def step(model: LanguageModel, state: dict[str, torch.Tensor], sums: dict[str, torch.Tensor], number: int) -> None:
    """Plain gradient descent of level `number` with the learned step sizes."""
    for name in [n for n in sums if f".cms.{number}.delta" in n]:
        block = model.get_submodule(name.split(".cms.")[0])
        state[name] = state[name] - block.cms.rate(number - 1) * sums.pop(name)


PLAIN = [("hope", "sequential"), ("hope", "stacked"), ("hope-attention", "stacked")]


@pytest.mark.parametrize(("family", "cms"), PLAIN)
def test_with_step_size_zero_the_model_is_exactly_the_one_without_levels(
    family: str, cms: str, make_model: MakeModel
) -> None:
    plain = make_model(family)
    levels = of_variant(cms, LEVELS, rate=0.0)
    model = FAMILIES.get(family).from_config({**plain.to_config(), "levels": levels, "cms": cms}).double()
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    tokens = draw_tokens(1, 2, 30)
    with torch.no_grad():
        found, expected = model.scan(tokens, None, 0)[0], plain.scan(tokens, None, 0)[0]
    # Attention of a chunk at a time adds up in another order than attention of all tokens.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0 if family == "hope" else 1e-13)


@pytest.mark.parametrize(("family", "cms"), PLAIN)
def test_a_new_level_starts_as_nothing_and_learns(family: str, cms: str, make_model: MakeModel) -> None:
    plain = make_model(family)
    fields = {**plain.to_config(), "levels": of_variant(cms, LEVELS), "cms": cms}
    model = FAMILIES.get(family).from_config(fields).double().requires_grad_(False)
    model.load_state_dict(plain.state_dict(), strict=False)
    tokens = draw_tokens(1, 1, 30)
    found, expected = model.scan(tokens, None, 0)[0], plain.scan(tokens, None, 0)[0]
    torch.testing.assert_close(found[:, :4], expected[:, :4], rtol=0.0, atol=1e-13)
    assert (found[:, 9:] - expected[:, 9:]).abs().max() > 1e-6


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_parameter_learns_through_two_segments(
    setup: dict[str, Any], optimizer: str, make_model: MakeModel
) -> None:
    """First-order meta-learning: the starts and the step sizes get gradients, the carried state does not."""
    if setup["levels"][0]["rank"] and OPTIMIZERS.get(optimizer).needs_inputs:
        pytest.skip("refused at load")
    chunk = 4 if OPTIMIZERS.get(optimizer).needs_inputs else 8
    setup["levels"] = [{**level, "optimizer": optimizer} for level in setup["levels"]]
    setup["levels"][1]["chunk"] = chunk
    model = make_model(**setup)
    _, state = model.scan(draw_tokens(2, 2, 8), None, 0)
    state = {name: t.detach() for name, t in state.items()}
    hidden, _ = model.scan(draw_tokens(3, 2, 16), state, 8)
    model.logits(hidden.flatten(0, 1)).square().sum().backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()}
    assert not idle


def test_a_fresh_session_beside_others_does_not_take_their_step(make_model: MakeModel) -> None:
    """The trainer zeroes a lane where its session ends, in the middle of the other lanes' clocks."""
    model, tokens = make_model(**SETUPS[0]).requires_grad_(False), draw_tokens(5, 2, 24)
    _, state = model.scan(tokens[:, :8], None, 0)
    state = {n: t.clone() for n, t in state.items()}
    for tensor in state.values():
        tensor[1] = 0
    out, _ = model.scan(tokens[:, 8:], state, 8)
    expected, _ = model.scan(tokens[1:, 8:], None, 0)
    torch.testing.assert_close(out[1:], expected, **EXACT)


def test_a_diverging_session_keeps_its_levels_and_its_companions_learn(make_model: MakeModel) -> None:
    model, tokens = make_model(**SETUPS[0]).requires_grad_(False), draw_tokens(5, 2, 8)
    _, state = model.scan(tokens, None, 0)
    names = [s.name for s in model.state_spec()]
    pool = {n: torch.cat([torch.zeros_like(state[n][:1]), state[n]]) for n in names}
    pool["chunk.stream"][1, 2] = float("nan")
    before = {n: t.clone() for n, t in pool.items()}
    stepped = model.update(torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([8, 8]), pool)
    assert stepped.good.tolist() == [False, True]
    assert pool["cms.1.clock"].tolist() == [[0, 0, 0], [0, 1, 1], [0, 2, 0]]
    for name in [n for n in names if ".delta." in n or ".opt." in n]:
        assert torch.equal(pool[name][1], before[name][1])
        assert not torch.equal(pool[name][2], before[name][2])
    assert not pool["chunk.stream"].any()


def test_reading_past_a_full_chunk_is_refused(make_model: MakeModel) -> None:
    model = make_model(**SETUPS[0]).requires_grad_(False)
    pool = {s.name: torch.zeros(2, *s.shape, dtype=wide(s.dtype)) for s in model.state_spec()}
    batch = Batch(torch.arange(5), torch.tensor([0, 5]), torch.tensor([1]), torch.tensor([0]))
    with pytest.raises(StateError, match="past the end of a chunk of 4 tokens"):
        model(batch, pool)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"levels": [{"chunk": 4, "hidden": 2, "rank": 0}]}, r"levels\.0: rank must be at least 1, got 0"),
        ({"levels": [{"chunk": 8, "hidden": 2}, {"chunk": 12, "hidden": 2}]}, r"levels\.1\.chunk is 12"),
        ({"levels": [{"chunk": 4, "hidden": 2, "optimizer": "x"}]}, r"levels\.0: unknown optimizer 'x'"),
        ({"levels": [{"chunk": 4}]}, r"levels\.0\.hidden is None, and cms 'sequential': give the MLP's width"),
        ({"levels": LEVELS, "cms": "stacked"}, r"levels\.0\.hidden is 6, and cms 'stacked': leave it out"),
        ({"levels": [7]}, r"levels\.0 must be an object"),
        ({"levels": {"chunk": 4}}, "'levels' must be"),
        ({"levels": LEVELS, "cms": "parallel"}, "cms must be one of"),
        ({"levels": LEVELS, "adaptive_blocks": 3}, r"adaptive_blocks must be in 1\.\.2"),
    ],
)
def test_impossible_levels_are_refused_at_load(fields: dict[str, Any], named: str) -> None:
    kind = FAMILIES.get("hope")
    with pytest.raises(ConfigError, match=named):
        kind.from_config({**kind.TINY, **fields})
