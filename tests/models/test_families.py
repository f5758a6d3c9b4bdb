"""The contract of every registered family: scan and forward are one computation, whatever the split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_runtime.core import Batch
from nested_runtime.errors import ConfigError
from nested_runtime.models.base import LanguageModel
from nested_runtime.registry import FAMILIES
from nested_runtime.state.pool import SlotPool

MakeModel = Callable[..., LanguageModel]
EXAMPLES = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
EXACT = {"rtol": 0.0, "atol": 1e-10}


def draw_tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def draw_ends(data: st.DataObject, length: int) -> list[int]:
    return sorted({*data.draw(st.lists(st.integers(1, length)), "cuts"), length})


def forward_in_pieces(model: LanguageModel, tokens: torch.Tensor, ends: list[int], slot: int) -> Any:
    """Hidden states and state of one session that reads `tokens` [T] through a pool, in the engine's way."""
    pool = SlotPool(tuple(replace(s, dtype=torch.float64) for s in model.state_spec()), slot + 1)
    while pool.acquire() != slot:
        pass
    outs, begin = [], 0
    for end in ends:
        cu = torch.tensor([0, end - begin], dtype=torch.int32)
        kv = pool.extend([slot], [end - begin])
        batch = Batch(tokens[begin:end], cu, torch.tensor([slot], dtype=torch.int32), torch.tensor([begin]), kv)
        outs.append(model(batch, pool.tensors))
        begin = end
    state = pool.save(slot)
    pool.release(slot)
    assert not any(tensor.any() for tensor in pool.tensors.values()), "something else was written"
    return torch.cat(outs), {name: tensor[None] for name, tensor in state.items()}


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 4), st.data())
def test_forward_through_a_pool_equals_scan(
    family: str, make_model: MakeModel, seed: int, length: int, slot: int, data: st.DataObject
) -> None:
    model, tokens = make_model(family), draw_tokens(seed, length)
    hidden, state = forward_in_pieces(model, tokens, draw_ends(data, length), slot)
    expected, new = model.scan(tokens[None], None, 0)
    torch.testing.assert_close(hidden, expected[0], **EXACT)
    assert_equal_states(state, new)


@torch.no_grad()
@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 20), st.data())
def test_scan_of_any_split_equals_the_whole(
    family: str, make_model: MakeModel, seed: int, length: int, data: st.DataObject
) -> None:
    model, tokens = make_model(family), draw_tokens(seed, 2, length)
    state, begin, outs = None, 0, []
    for end in draw_ends(data, length):
        out, state = model.scan(tokens[:, begin:end], state, begin)
        outs.append(out)
        begin = end
    expected, whole = model.scan(tokens, None, 0)
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, **EXACT)
    assert state is not None
    assert_equal_states(state, whole)


def test_spec_names_shapes_and_levels(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    specs = model.state_spec()
    _, state = model.scan(draw_tokens(0, 3, 7), None, 0)
    assert len({s.name for s in specs}) == len(specs)
    shapes = {s.name: (3, *((min(7, s.shape[0]), *s.shape[1:]) if s.grows else s.shape)) for s in specs}
    assert shapes == {name: tuple(t.shape) for name, t in state.items()}
    assert all(s.level and s.dtype == torch.float32 for s in specs)


def test_memory_names_tensors_of_the_spec_and_is_zero_when_fresh(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    known = {spec.name for spec in model.state_spec()}
    zeros = {s.name: torch.zeros(1, *s.fresh_shape, dtype=torch.float64) for s in model.state_spec()}
    assert not any(tensor.any() for tensor in model.memory(zeros).values())
    _, state = model.scan(draw_tokens(0, 3, 7), None, 0)
    found = model.memory(state)
    assert found.keys() <= known
    assert all(len(tensor) == 3 and tensor.is_floating_point() and tensor.any() for tensor in found.values())
    assert bool(found) == bool(known)


def test_a_config_builds_the_same_model_again(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    again = FAMILIES.get(family).from_config(model.to_config())
    assert again.to_config() == model.to_config()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in again.named_parameters()}
    assert (again.vocab_size, again.chunk) == (model.vocab_size, model.chunk)


def test_logits_are_float32_but_for_float64(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    assert model.logits(torch.zeros(3, 16).double()).dtype == torch.float64
    assert model.bfloat16().logits(torch.zeros(3, 16).bfloat16()).dtype == torch.float32
    assert model.logits(torch.zeros(3, 16).bfloat16()).shape == (3, 64)


def test_memories_stay_float32_in_a_bfloat16_model(family: str, make_model: MakeModel) -> None:
    model = make_model(family).bfloat16()
    tokens = draw_tokens(1, 2, 9)
    hidden, state = model.scan(tokens, None, 0)
    expected, _ = model.float().scan(tokens, None, 0)
    assert {t.dtype for t in state.values()} == {torch.float32}
    # Twice the most of 40 random starts (0.029): rounding of 2^-9 a product, magnified where norms are small.
    assert (hidden.float() - expected).norm() < 0.06 * expected.norm()


def test_every_parameter_learns(family: str, make_model: MakeModel) -> None:
    """Through two carried segments, as in training."""
    model = make_model(family)
    _, state = model.scan(draw_tokens(2, 2, 8), None, 0)
    hidden, _ = model.scan(draw_tokens(3, 2, 8), state, 8)
    model.logits(hidden.flatten(0, 1)).square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not idle


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("dim", 0, "'dim' must be at least 1, got 0"),
        ("dim", "16", "'dim' must be"),
        ("blocks", True, "'blocks' must be"),
        ("max_context", -1, "'max_context' must be at least 1"),
        ("colour", 3, "unknown config field 'colour'; known: .*vocab_size"),
    ],
)
def test_config_errors_name_the_field(family: str, field: str, value: object, named: str) -> None:
    kind = FAMILIES.get(family)
    with pytest.raises(ConfigError, match=named):
        kind.from_config({**kind.TINY, field: value})


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [("hope", "read", "sometimes"), ("hope", "retain", ""), ("transformer", "head_dim", 7)],
)
def test_config_errors_of_one_family(family: str, field: str, value: object) -> None:
    kind = FAMILIES.get(family)
    with pytest.raises(ConfigError, match=field):
        kind.from_config({**kind.TINY, field: value})


def test_a_missing_field_is_named(family: str) -> None:
    kind = FAMILIES.get(family)
    fields = {k: v for k, v in kind.TINY.items() if k != "vocab_size"}
    with pytest.raises(ConfigError, match="'vocab_size' is missing"):
        kind.from_config(fields)


def test_hope_remembers_beyond_a_window_and_the_control_does_not(make_model: MakeModel) -> None:
    """What the control is for: 2 blocks of window 5 see 9 tokens back, HOPE's state sees everything."""
    for family, remembers in (("hope", True), ("transformer", False)):
        model = make_model(family)
        tokens = draw_tokens(4, 1, 30)
        changed = tokens.clone()
        changed[0, 0] = (tokens[0, 0] + 1) % 64
        moved = (model.scan(tokens, None, 0)[0] - model.scan(changed, None, 0)[0]).abs()[0, -1].max()
        assert bool(moved > 1e-12) == remembers
