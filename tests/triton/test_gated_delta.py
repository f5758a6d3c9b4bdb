"""The plain gated delta rule: decode, fork, ragged prefill and gradients against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize

from nested_runtime.kernels.gated_delta import reference
from nested_runtime.kernels.gated_delta.triton import gated_delta, packed_gated_delta

Normal = Callable[..., torch.Tensor]
Relative = Callable[[torch.Tensor, torch.Tensor], float]
TOLERANCE = 1e-4
LENGTHS, SLOTS = (35, 1, 4), (2, 3, 0)  # the last is padding


def draw(normal: Normal, total: int, dim: int, rows: int, log_alpha: float) -> list[torch.Tensor]:
    """q, k, v, log_alpha, eta of two heads."""
    q, k = (normalize(normal(total, 2, dim), dim=-1) for _ in range(2))
    decay = log_alpha * torch.sigmoid(normal(total, 2))
    return [q, k, normal(total, 2, rows), decay, 0.5 * decay.exp() * torch.sigmoid(normal(total, 2))]


def expected(inputs: list[torch.Tensor], start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exact = [t.double().cpu()[None] for t in inputs]
    out, state = reference.gated_delta(*exact, start.double().cpu()[None])
    return out[0], state[0]


@pytest.mark.parametrize(("dim", "rows", "log_alpha"), [(6, 5, -0.1), (64, 40, 0.0), (16, 16, -200.0)])
def test_ragged_batches_equal_the_reference(
    dim: int, rows: int, log_alpha: float, device: torch.device, normal: Normal, relative: Relative
) -> None:
    inputs = draw(normal, sum(LENGTHS), dim, rows, log_alpha)
    pool = normal(5, 2, rows, dim)
    before = pool.clone()
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=device)
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    out = packed_gated_delta(*inputs, pool, slots, bounds)
    pieces = [t.split(LENGTHS) for t in inputs]
    for b, found in enumerate(out.split(LENGTHS)):
        if not SLOTS[b]:
            assert not found.any()
            continue
        read, state = expected([p[b] for p in pieces], before[SLOTS[b]])
        assert relative(found, read) <= TOLERANCE
        assert relative(pool[SLOTS[b]], state) <= TOLERANCE
    assert all(torch.equal(pool[s], before[s]) for s in (0, 1, 4)), "other slots were written"


def test_a_fork_writes_to_its_own_slot(device: torch.device, normal: Normal, relative: Relative) -> None:
    inputs = draw(normal, 3, 16, 16, -0.1)
    pool = normal(4, 2, 16, 16)
    before = pool.clone()
    ints = {"dtype": torch.int32, "device": device}
    slots, out_slots = torch.tensor([1, 1, 0], **ints), torch.tensor([2, 3, 0], **ints)
    bounds = torch.arange(4, **ints)
    out = packed_gated_delta(*inputs, pool, slots, bounds, out_slots=out_slots, longest=1)
    assert torch.equal(pool[:2], before[:2])
    for b in (0, 1):
        read, state = expected([t[b : b + 1] for t in inputs], before[1])
        assert relative(out[b : b + 1], read) <= TOLERANCE
        assert relative(pool[2 + b], state) <= TOLERANCE
    assert not out[2].any()


def test_near_equal_keys(device: torch.device, normal: Normal, relative: Relative) -> None:
    inputs = draw(normal, 64, 16, 16, 0.0)
    inputs[1] = normalize(inputs[1][:1] + 1e-6 * inputs[1], dim=-1)
    pool = torch.zeros(2, 2, 16, 16, device=device)
    ints = {"dtype": torch.int32, "device": device}
    out = packed_gated_delta(*inputs, pool, torch.tensor([1], **ints), torch.tensor([0, 64], **ints))
    read, state = expected(inputs, torch.zeros(2, 16, 16))
    assert relative(out, read) <= TOLERANCE
    assert relative(pool[1], state) <= TOLERANCE


@pytest.mark.parametrize("length", [33, 5])
def test_gradients_equal_those_of_the_reference(length: int, normal: Normal, relative: Relative) -> None:
    batch, dim, rows = 2, 8, 40
    flat = draw(normal, batch * length, dim, rows, -0.1)
    inputs = [t.unflatten(0, (batch, length)) for t in flat] + [normal(batch, 2, rows, dim)]
    probes = normal(batch, length, 2, rows), normal(batch, 2, rows, dim)
    ours = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().cpu().requires_grad_() for t in inputs]
    for arguments, op in ((ours, gated_delta), (exact, reference.gated_delta)):
        loss = sum((a * p.to(a)).sum() for a, p in zip(op(*arguments), probes, strict=True))
        loss.backward()
    for name, a, b in zip(("q", "k", "v", "log_alpha", "eta", "state"), ours, exact, strict=True):
        assert relative(a.grad, b.grad) <= TOLERANCE, name


def test_a_second_derivative_fails_instead_of_being_wrong(normal: Normal) -> None:
    inputs = [t[None].requires_grad_() for t in draw(normal, 3, 4, 4, -0.1)]
    out, _ = gated_delta(*inputs, normal(1, 2, 4, 4))
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
