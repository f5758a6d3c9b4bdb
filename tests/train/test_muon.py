"""Muon's products in batches: the same steps as torch's, one matrix at a time in bf16, but for rounding."""

from __future__ import annotations

import torch

from nested_runtime.train.muon import Muon


def test_steps_are_those_of_torch() -> None:
    g = torch.Generator().manual_seed(1)
    start = [torch.randn(12, 8, generator=g), torch.randn(12, 8, generator=g), torch.randn(8, 16, generator=g)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.01}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        grads = [torch.randn(t.shape, generator=g) for t in start]
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        step = (b - before).norm()
        assert (a - b).norm() < 0.03 * step  # torch rounds the products to bf16
        assert step > 0


def test_a_parameter_without_gradient_stays() -> None:
    still, moved = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    moved.grad = torch.eye(4)
    Muon([still, moved], lr=0.1).step()
    assert torch.equal(still.detach(), torch.ones(4, 4))
    assert not torch.equal(moved.detach(), torch.ones(4, 4))
