"""The general linear memory against its equations, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.kernels.linear_memory.scan import linear_scan

EXACT = {"rtol": 0.0, "atol": 1e-11}
N, K, R = 2, 4, 6


def draw(seed: int, n: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    vectors = {name: torch.randn(N, n, K, dtype=torch.float64) for name in ("q", "k")}
    gates = {name: torch.rand(N, n, dtype=torch.float64) for name in ("erase", "alpha", "mu")}
    states = {name: torch.randn(N, R, K, dtype=torch.float64) for name in ("memory", "momentum")}
    return {**vectors, **gates, **states, "write": torch.randn(N, n, R, dtype=torch.float64)}


def by_hand(x: dict[str, torch.Tensor], erases: bool, moves: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d = w - e X k;  S = mu S + d k^T;  X = alpha X + S;  o = X q."""
    memory = x["memory"]
    momentum = x["momentum"] if moves else torch.zeros_like(memory)
    outs = []
    for t in range(x["q"].shape[1]):
        q, k, d = (x[name][:, t, :, None] for name in ("q", "k", "write"))
        if erases:
            d = d - x["erase"][:, t, None, None] * (memory @ k)
        momentum = (x["mu"][:, t, None, None] if moves else 0.0) * momentum + d @ k.mT
        memory = x["alpha"][:, t, None, None] * memory + momentum
        outs.append((memory @ q)[..., 0])
    return torch.stack(outs, 1), memory, momentum


def scan(x: dict[str, torch.Tensor], erases: bool, moves: bool, rows: slice = slice(None)) -> tuple[torch.Tensor, ...]:
    return linear_scan(
        x["q"], x["k"], x["write"], x["erase"] if erases else None, x["alpha"].log(),
        x["mu"].log() if moves else None, x["memory"], x["momentum"] if moves else None, rows,
    )  # fmt: skip


@pytest.mark.parametrize("erases", [False, True])
@pytest.mark.parametrize("moves", [False, True])
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_it_is_the_recurrence(erases: bool, moves: bool, seed: int, n: int) -> None:
    x = draw(seed, n)
    out, memory, momentum = scan(x, erases, moves)
    expected, last, inertia = by_hand(x, erases, moves)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(memory, last, **EXACT)
    assert (momentum is None) != moves
    if moves:
        torch.testing.assert_close(momentum, inertia, **EXACT)


def test_only_the_rows_asked_for_are_read() -> None:
    x = draw(0, 5)
    torch.testing.assert_close(scan(x, True, True, slice(2, 4))[0], scan(x, True, True)[0][..., 2:4], **EXACT)


def test_retention_and_momentum_of_zero_stay_finite_with_gradients() -> None:
    """log 0 is -inf, and -inf - (-inf) is no number: gates saturate to tiny values, not to zero, but must be usable."""
    x = {name: t.requires_grad_() for name, t in draw(1, 40).items()}
    logs = torch.full((N, 40), -30.0, dtype=torch.float64, requires_grad=True)
    out, memory, _ = linear_scan(
        x["q"], x["k"], x["write"], x["erase"], logs, logs, x["memory"], x["momentum"], slice(None)
    )
    (out.sum() + memory.sum()).backward()
    assert out.isfinite().all()
    assert logs.grad is not None
    assert logs.grad.isfinite().all()
