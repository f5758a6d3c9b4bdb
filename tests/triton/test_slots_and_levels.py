"""Slots, levels and the MLP memory's gradient against their references, padding and strides included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nested_runtime.kernels.levels import reference as levels
from nested_runtime.kernels.levels import triton as fast_levels
from nested_runtime.kernels.mlp_memory import reference as memory
from nested_runtime.kernels.mlp_memory import triton as fast_memory
from nested_runtime.kernels.slots import reference as slots_
from nested_runtime.kernels.slots import triton as fast_slots
from nested_runtime.memory.level import Deltas, packed_change

Normal = Callable[..., torch.Tensor]
Relative = Callable[[torch.Tensor, torch.Tensor], float]


@pytest.fixture
def slots(device: torch.device) -> torch.Tensor:
    return torch.tensor([3, 0, 1], dtype=torch.int32, device=device)


def pool_of(normal: Normal, *shape: int) -> torch.Tensor:
    """Five slots with a gap between them, slot 0 zero."""
    size = torch.Size(shape).numel()
    pool = normal(5, size + 3)[:, :size].unflatten(1, shape)
    pool[0] = 0
    return pool


def test_int8_and_back(normal: Normal, slots: torch.Tensor) -> None:
    pool = pool_of(normal, 3, 18, 20)
    pool[3, 1, 2] = 0  # a row of zeros
    q, scale = fast_slots.pack_int8(pool, slots)
    expected, scales = slots_.pack_int8(pool, slots)
    assert torch.equal(q, expected)
    assert torch.equal(scale, scales)
    before = pool.clone()
    fast_slots.unpack_int8(q, scale, pool, slots)
    assert torch.equal(pool[0], before[0])
    assert torch.equal(pool[2], before[2])
    assert ((pool - before).abs() <= 0.5 * before.abs().amax(-1, keepdim=True) / 127 + 1e-7).all()


def test_low_rank_deltas_are_grouped_by_slot(
    device: torch.device, normal: Normal, relative: Relative, slots: torch.Tensor
) -> None:
    x, y, start = normal(24, 70), normal(24, 80), normal(5, 70)
    inner, outer = pool_of(normal, 5, 70), pool_of(normal, 80, 5)
    bounds = torch.tensor([0, 19, 22, 24], dtype=torch.int32, device=device)
    exact = y.double().cpu()
    levels.low_rank_apply(
        x.double().cpu(), exact, start.double().cpu(), inner.double().cpu(), outer.double().cpu(), slots.cpu(), bounds
    )
    before = y.clone()
    fast_levels.low_rank_apply(x, y, start, inner, outer, slots, bounds)
    assert relative(y, exact) <= 1e-5
    assert torch.equal(y[19:22], before[19:22])


def test_packed_deltas_of_a_model_come_from_these_kernels(
    device: torch.device, normal: Normal, relative: Relative, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    start = Deltas((30, 20), (20, 30), rank=3).to(device)
    pool = {name: pool_of(normal, *shape) for name, shape in start.shapes().items()}
    spans = [(3, 2, 19), (1, 21, 22)]  # rows of sessions that have learned nothing lie before, between and behind
    x, y = normal(24, 20), normal(24, 30)
    exact, found = y.clone(), y.clone()
    with torch.no_grad():
        packed_change(start, pool, spans)("up", x, exact)
        monkeypatch.setattr("nested_runtime.memory.level.function", lambda *_: fast_levels.low_rank_apply)
        packed_change(start, pool, spans)("up", x, found)
        assert relative(found, exact) <= 1e-5
        untouched = torch.tensor([0, 1, 19, 20, 22, 23], device=device)
        assert torch.equal(found[untouched], y[untouched])
        assert (found[2:19] != y[2:19]).any()


@pytest.mark.parametrize("full", [False, True])
def test_steps(full: bool, normal: Normal, relative: Relative, slots: torch.Tensor) -> None:
    pool, momentum, gradient = pool_of(normal, 50, 60), pool_of(normal, 50, 60), normal(3, 50, 60)
    rate, decay = normal(3).abs(), torch.sigmoid(normal(3))
    exact, exact_m = pool.clone(), momentum.clone()
    more = ((momentum, 0.9, decay), (exact_m, 0.9, decay)) if full else ((), ())
    fast_levels.step(pool, gradient, slots, rate, *more[0])
    levels.step(exact, gradient, slots, rate, *more[1])
    assert relative(pool, exact) <= 1e-6
    assert relative(momentum, exact_m) <= 1e-6


def test_dense_update(normal: Normal, relative: Relative, slots: torch.Tensor) -> None:
    pool, errors, inputs, rate = pool_of(normal, 70, 80), normal(3, 33, 70), normal(3, 33, 80), normal(3).abs()
    exact = pool.double().cpu()
    levels.outer_step(exact, errors.double().cpu(), inputs.double().cpu(), slots.cpu(), rate.double().cpu())
    fast_levels.outer_step(pool, errors, inputs, slots, rate)
    assert relative(pool, exact) <= 1e-5


def test_gradient_of_the_mlp_memory(normal: Normal, relative: Relative, slots: torch.Tensor) -> None:
    k, v, theta = normal(3, 11, 2, 20), normal(3, 11, 2, 20), torch.sigmoid(normal(3, 11, 2))
    w1, w2 = 0.3 * pool_of(normal, 2, 20, 40), 0.3 * pool_of(normal, 2, 40, 20)
    found = fast_memory.chunk_gradient(k, v, theta, w1, w2, slots)
    exact = [t.double().cpu() for t in (k, v, theta, w1, w2)]
    for a, b in zip(found, memory.chunk_gradient(*exact, slots.cpu()), strict=True):
        assert relative(a, b) <= 1e-5
        assert not a[1].any()


def test_reference_gradient_is_autograds(normal: Normal) -> None:
    k, v, theta = normal(1, 4, 1, 6).double(), normal(1, 4, 1, 6).double(), torch.rand(1, 4, 1, dtype=torch.float64)
    w1, w2 = (t.double().cpu().requires_grad_() for t in (normal(2, 1, 6, 8), normal(2, 1, 8, 6)))
    slots = torch.tensor([1])
    found = memory.chunk_gradient(k.cpu(), v.cpu(), theta, w1, w2, slots)
    out = k[0, :, 0].cpu() + torch.nn.functional.gelu(k[0, :, 0].cpu() @ w2[1, 0].t()) @ w1[1, 0].t()
    loss = 0.5 * (theta[0, :, 0, None] * (out - v[0, :, 0].cpu()).square()).sum()
    for g, expected in zip(found, torch.autograd.grad(loss, (w1, w2)), strict=True):
        torch.testing.assert_close(g[0, 0], expected[1, 0])
