"""Sliding-window attention against attention written out token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.errors import ConfigError
from nested_runtime.memory.attention import SlidingAttention, rotate


def plain_attention(rule: SlidingAttention, x: torch.Tensor) -> torch.Tensor:
    """x [T, D]: each token attends to itself and the W - 1 before it; rotation by the distance, in the score."""
    q, k, v = (x @ rule.w_in.t()).view(len(x), 3, rule.heads, rule.head_dim).unbind(1)
    outs = []
    for t in range(len(x)):
        seen = range(max(0, t - rule.window + 1), t + 1)
        turned = torch.stack([rotate(k[j][:, None], torch.tensor([j - t]))[:, 0] for j in seen])
        weights = ((q[t] * turned).sum(-1) / rule.head_dim**0.5).softmax(0)
        outs.append((weights[..., None] * v[list(seen)]).sum(0).flatten())
    return torch.stack(outs) @ rule.w_out.t()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**20))
def test_equals_plain_attention_at_any_position(seed: int, length: int, window: int, position: int) -> None:
    torch.manual_seed(seed)
    rule = SlidingAttention(6, 2, 4, window).double()
    rule.w_out.data.normal_()
    x = torch.randn(length, 6, dtype=torch.float64)
    state = {s.name: torch.zeros(1, *s.shape, dtype=torch.float64) for s in rule.state()}
    out, _ = rule.scan(x[None], state, position)
    torch.testing.assert_close(out[0], plain_attention(rule, x), rtol=0, atol=1e-9)


def test_positions_far_into_a_session_keep_their_precision() -> None:
    torch.manual_seed(0)
    rule = SlidingAttention(16, 2, 8, 8)
    rule.w_out.data.normal_()
    x = torch.randn(1, 20, 16)
    state = {s.name: torch.zeros(1, *s.shape) for s in rule.state()}
    near, far = (rule.scan(x, state, position)[0] for position in (0, 1 << 20))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_nothing_before_the_window_is_seen() -> None:
    torch.manual_seed(0)
    rule = SlidingAttention(6, 1, 4, 3).double()
    rule.w_out.data.normal_()
    x = torch.randn(1, 10, 6, dtype=torch.float64)
    state = {s.name: torch.zeros(1, *s.shape, dtype=torch.float64) for s in rule.state()}
    changed = x.clone()
    changed[:, 4] += 1
    moved = (rule.scan(x, state, 0)[0] - rule.scan(changed, state, 0)[0]).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [4 <= t <= 6 for t in range(10)]


def test_an_odd_head_dimension_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^head_dim must be even.*got 5"):
        SlidingAttention(8, 2, 5, 4)
