"""The causal convolution: any split of the tokens gives the same outputs and window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv1d, silu

from nested_runtime.kernels.dispatch import KernelConfig, choose
from nested_runtime.kernels.short_conv import differentiable, reference
from nested_runtime.kernels.short_conv.differentiable import short_conv


def draw_conv(seed: int, batch: int, length: int, width: int, features: int = 3) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, length, features), (batch, width - 1, features), (width, features)
    return tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 15), st.integers(1, 5), st.data())
def test_any_split_equals_the_whole(seed: int, length: int, width: int, data: st.DataObject) -> None:
    x, window, weight = draw_conv(seed, 2, length, width)
    whole, last = short_conv(x, window, weight)
    ends = sorted({*data.draw(st.lists(st.integers(1, length)), "cuts"), length})
    parts, begin, carried = [], 0, window
    for end in ends:
        y, carried = short_conv(x[:, begin:end], carried, weight)
        parts.append(y)
        begin = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    assert torch.equal(carried, last)


def test_equals_torchs_grouped_convolution() -> None:
    x, window, weight = draw_conv(0, 2, 9, 4)
    padded = torch.cat([window, x], dim=1).transpose(1, 2)
    expected = silu(conv1d(padded, weight.t()[:, None], groups=3)).transpose(1, 2)
    torch.testing.assert_close(short_conv(x, window, weight)[0], expected)


def test_no_token_sees_a_later_one() -> None:
    x, window, weight = draw_conv(1, 1, 8, 4)
    changed = x.clone()
    changed[:, 5] += 1
    before, after = (short_conv(t, window, weight)[0] for t in (x, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).all()


def test_window_keeps_its_precision() -> None:
    x, window, weight = draw_conv(2, 1, 5, 4)
    y, new = short_conv(x.bfloat16(), window.float(), weight.float())
    assert (y.dtype, new.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("length", "width"), [(1, 4), (5, 4), (3, 1)])
def test_gradcheck_of_short_conv(length: int, width: int) -> None:
    inputs = tuple(t.requires_grad_() for t in draw_conv(3, 2, length, width, features=2))
    assert torch.autograd.gradcheck(short_conv, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [True, False])
def test_training_equals_the_reference(dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of the loops written by hand, and of torch's autograd through the equation."""
    monkeypatch.setattr(differentiable, "_is_compiled", lambda _: compiled)
    results = []
    for conv in (short_conv, reference.short_conv):
        inputs = [t.to(dtype).requires_grad_() for t in draw_conv(4, 3, 11, 5, features=4)]
        y, last = conv(*inputs)
        torch.autograd.backward((y * y).sum() + (last * last).sum())
        results.append([y.detach(), last.detach(), *(t.grad for t in inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    for name, compiled in (("reference", False), ("auto", True)):
        chosen = choose(KernelConfig(name), "cpu", x.dtype)
        monkeypatch.setattr(differentiable, "packed_kernels", lambda *_, chosen=chosen: chosen)
        assert differentiable._is_compiled(x) is compiled
