"""Every deep optimizer on the toy of NL Eq. 53 and on a small image classification, each at its best learning rate.

    python -m benchmarks.optimizers [--steps 150] [--seeds 3] [--out build/bench] [--images docs/images]

Writes build/bench/optimizers.json and two plots. The images are made here: ten random shapes, shifted and noisy, so
that nothing is downloaded; the network is a convolution, a pooling and two linear layers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.curves import curves
from nested_runtime.optim.base import InnerRule, build_rule
from nested_runtime.optim.optimizer import deep_optimizer
from nested_runtime.registry import OPTIMIZERS

TOY_RATES = [10 ** (-x / 8) for x in range(36)]
TOY_STEPS, TOY_GOAL = 800, 1e-6
# Options of the toy: every optimizer with a momentum may choose it, as in NL section 4.4.
TOY_OPTIONS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "momentum": [{"momentum": m} for m in (0.5, 0.8, 0.9, 0.95, 0.98)],
    "delta-momentum": [{"momentum": m, "erase": 0.8} for m in (0.9, 0.98)],
    "deep-momentum": [{}],
    "adam": [{}],
    "gd": [{}],
}  # Muon, M3 and DGD are for matrices: on two numbers they are Adam or GD
RATES: Mapping[str, Sequence[float]] = {
    "gd": (0.03, 0.1, 0.3, 1.0),
    "momentum": (0.01, 0.03, 0.1, 0.3),
    "dgd": (0.03, 0.1, 0.3, 1.0),
    "delta-momentum": (0.01, 0.03, 0.1, 0.3),
    "deep-momentum": (0.1, 0.2, 0.3, 0.5),
    "adam": (0.001, 0.003, 0.01, 0.03),
    "muon": (0.003, 0.01, 0.03, 0.1),
    "m3": (0.003, 0.01, 0.03, 0.1),
}
SIZE, CLASSES, BATCH = 10, 10, 64


# ---- the toy ---------------------------------------------------------------------------------------------------------


def toy(rule: InnerRule, rates: Sequence[float], steps: int = TOY_STEPS) -> torch.Tensor:
    """Losses [steps, rates] of r^2 + k (r - theta + a sin(w r))^2, k = 20, a = 1, w = 2, from (-3.5, 2)."""
    k, a, w = 20.0, 1.0, 2.0
    lr = torch.tensor(rates, dtype=torch.float64)
    p = torch.tensor([[-3.5, 2.0]], dtype=torch.float64).repeat(len(rates), 1)
    state, losses = rule.init(p), []
    for _ in range(steps):
        r, theta = p.unbind(1)
        u = r - theta + a * torch.sin(w * r)
        losses.append((r**2 + k * u**2).nan_to_num(torch.inf))
        grad = torch.stack([2 * r + 2 * k * u * (1 + a * w * torch.cos(w * r)), -2 * k * u], dim=1)
        p, state = rule.step(p, grad, state, lr)
    return torch.stack(losses)


def steps_to(losses: torch.Tensor, goal: float = TOY_GOAL) -> list[float]:
    """The first step below the goal for every learning rate, infinite where there is none."""
    below = losses < goal
    return [float(column.int().argmax()) if column.any() else math.inf for column in below.unbind(1)]


def best_on_toy(name: str) -> dict[str, Any]:
    """Options and learning rate with the fewest steps, and the losses on the way."""
    runs = [(options, toy(build_rule(name, options), TOY_RATES)) for options in TOY_OPTIONS[name]]
    steps, options, number, losses = min(
        ((s, options, i, losses) for options, losses in runs for i, s in enumerate(steps_to(losses))),
        key=lambda run: run[0],
    )
    if not math.isfinite(steps):
        options, losses = min(runs, key=lambda run: float(run[1][-1].min()))
        number = int(losses[-1].argmin())
    curve = losses[:, number].tolist()
    return {"optimizer": name, "options": dict(options), "lr": TOY_RATES[number], "steps": steps, "losses": curve}


# ---- classification --------------------------------------------------------------------------------------------------


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [count, 1, S, S] of ten fixed shapes, shifted by up to two pixels, under noise; their classes."""
    shapes = torch.randn(CLASSES, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    shifts = torch.randint(-2, 3, (count, 2), generator=generator).tolist()
    moved = torch.stack(
        [shapes[label].roll(shift, (1, 2)) for label, shift in zip(labels.tolist(), shifts, strict=True)]
    )
    return moved + 0.7 * torch.randn(moved.shape, generator=generator), labels


def network(seed: int) -> nn.Sequential:
    """Convolution of 8 channels, pooling, 32 hidden units."""
    torch.manual_seed(seed)
    half = SIZE // 2
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * half * half, 32),
        nn.ReLU(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def train(name: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train on fresh pictures; training losses, and accuracy on others."""
    model = network(seed)
    optimizer = deep_optimizer(name, model.parameters(), lr, model)
    x, y = images(BATCH * steps, 1000 + seed)
    losses = []
    for i in range(steps):
        batch = slice(i * BATCH, (i + 1) * BATCH)
        loss = cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        test_x, test_y = images(500, 7)
        right = (model(test_x).argmax(1) == test_y).double().mean().item()
    return {"losses": losses, "right": right}


def best_on_images(name: str, steps: int, seeds: int) -> dict[str, Any]:
    """The learning rate with the highest accuracy, over the seeds."""
    best: dict[str, Any] = {}
    for lr in RATES[name]:
        began = time.process_time()
        runs = [train(name, lr, seed, steps) for seed in range(seeds)]
        seconds = (time.process_time() - began) / (seeds * steps)
        shares = [run["right"] for run in runs]
        mean = statistics.fmean(shares)
        if not best or mean > best["right"]:
            losses = [statistics.fmean(column) for column in zip(*(run["losses"] for run in runs), strict=True)]
            spread = statistics.stdev(shares) if seeds > 1 else None
            best = {"optimizer": name, "lr": lr, "right": mean, "std": spread, "losses": losses, "seconds": seconds}
    return best


# ---- figures ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of the classification")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    args = parser.parse_args(argv)
    on_toy = [best_on_toy(name) for name in TOY_OPTIONS]
    on_images = [best_on_images(name, args.steps, args.seeds) for name in OPTIMIZERS]
    print(f"{'NL Eq. 53':16} {'steps to 1e-6':>14} {'lr':>9}  options")
    for row in on_toy:
        print(f"{row['optimizer']:16} {row['steps']:>14.0f} {row['lr']:>9.5f}  {row['options']}")
    print(f"\n{'images':16} {'right, %':>14} {'std':>6} {'lr':>7} {'ms a step':>10}")
    for row in on_images:
        spread = "-" if row["std"] is None else f"{100 * row['std']:.1f}"
        share, milliseconds = 100 * row["right"], 1e3 * row["seconds"]
        print(f"{row['optimizer']:16} {share:>14.1f} {spread:>6} {row['lr']:>7} {milliseconds:>10.1f}")
    args.out.mkdir(parents=True, exist_ok=True)
    args.images.mkdir(parents=True, exist_ok=True)
    plots = {
        "optimizers-toy": ("NL Eq. 53: loss by step", on_toy),
        "optimizers-images": ("training loss by step, best learning rate of each", on_images),
    }
    for name, (title, rows) in plots.items():
        lines = {row["optimizer"]: row["losses"] for row in rows}
        (args.images / f"{name}.svg").write_text(curves(title, lines), encoding="utf-8")
    body = {"toy": [_finite(row) for row in on_toy], "images": on_images}
    (args.out / "optimizers.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    finite = [loss if math.isfinite(loss) else None for loss in row["losses"]]
    return {**row, "steps": row["steps"] if math.isfinite(row["steps"]) else None, "losses": finite}


if __name__ == "__main__":
    main()
