"""Levels: their configs, the three ways to combine them, dense and low-rank deltas, the bounded step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nested_runtime.errors import ConfigError
from nested_runtime.memory.cms import ContinuumMemory
from nested_runtime.memory.level import Change, Level, check_levels

DIM = 4


def chain(variant: str = "sequential", *levels: Level) -> ContinuumMemory:
    """A float64 chain with nothing at zero."""
    torch.manual_seed(0)
    made = ContinuumMemory(DIM, 6, levels, variant).double().requires_grad_(False)
    for p in made.parameters():
        p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    return made


def mlp(z: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (z @ up.t()).relu() ** 2 @ down.t()


def stream() -> torch.Tensor:
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"optimizer": "sgdd"}, "unknown optimizer 'sgdd'; known: .*gd"),
        ({"optimizer": "momentum", "options": {"momentum": 2}}, "option 'momentum'"),
        ({"optimizer": "gd", "options": {"beta": 2}}, "unknown option 'beta' of optimizer 'gd'"),
        ({"rate": -0.1}, "rate must be"),
        ({"max_step": 0.0}, "max_step must be"),
        ({"max_norm": float("inf")}, "max_norm must be"),
    ],
)
def test_impossible_levels_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Level(**{"chunk": 4, "hidden": 2, **fields})


@pytest.mark.parametrize(
    ("chunks", "named"),
    [
        ((8, 12), r"levels\.1\.chunk is 12: levels\.0\.chunk, 8, does not divide it"),
        ((8, 4), r"levels\.1\.chunk is 4: levels\.0\.chunk, 8"),
        ((6,), r"levels\.0\.chunk is 6: the model's chunk, 4"),
    ],
)
def test_chunks_that_do_not_divide_are_named(chunks: tuple[int, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_levels(tuple(Level(chunk, 2) for chunk in chunks), 4)


def test_the_nested_variant_needs_equal_levels_and_variants_are_known() -> None:
    with pytest.raises(ConfigError, match="'nested', so all levels must have the same hidden"):
        ContinuumMemory(DIM, 6, [Level(4, 2), Level(8, 3)], "nested")
    with pytest.raises(ConfigError, match=r"cms must be one of .*headwise"):
        ContinuumMemory(DIM, 6, [Level(4, 2)], "parallel")


def test_without_levels_it_is_an_mlp() -> None:
    made, z = chain(), stream()
    torch.testing.assert_close(made(z), mlp(z, made.up[0], made.down[0]))


@pytest.mark.parametrize("variant", ["sequential", "nested"])
def test_the_chain_reads_what_the_level_before_passes_on(variant: str) -> None:
    made, z = chain(variant, Level(4, 3), Level(8, 3)), stream()
    y = z + mlp(z, made.level(0).up, made.level(0).down)
    y = y + mlp(y, made.level(1).up, made.level(1).down)
    torch.testing.assert_close(made(z), y - z + mlp(y, made.up[0], made.down[0]))
    assert (made.level(0) is made.level(1)) == (variant == "nested")


def test_headwise_levels_are_a_weighted_sum() -> None:
    made, z = chain("headwise", Level(4, 3), Level(8, 2)), stream()
    reads = [w * mlp(z, made.level(i).up, made.level(i).down) for i, w in enumerate(made.heads)]
    torch.testing.assert_close(made(z), mlp(z, made.up[0], made.down[0]) + sum(reads))


@pytest.mark.parametrize("rank", [None, 2])
def test_a_delta_changes_the_weights_of_its_session_alone(rank: int | None) -> None:
    made, z = chain("sequential", Level(4, 3, rank)), stream()
    level = made.level(0)
    delta = {n: torch.randn(2, *s, dtype=torch.float64) for n, s in level.shapes().items()}
    change: Change = lambda which, x, y: y + level.delta_of(which, x, delta)  # noqa: E731
    for b in range(2):
        own = {name: tensor[b] for name, tensor in delta.items()}
        if rank is None:
            up, down = level.up + own["up"], level.down + own["down"]
        else:
            up = level.up + own["up_out"] @ (level.up_in + own["up_in"])
            down = level.down + own["down_out"] @ (level.down_in + own["down_in"])
        torch.testing.assert_close(level(z, change)[b], mlp(z[b], up, down))


def test_a_low_rank_delta_is_small_and_starts_as_nothing() -> None:
    made = ContinuumMemory(64, 64, [Level(4, 256, 2)])
    dense = ContinuumMemory(64, 64, [Level(4, 256)])
    sizes = [sum(spec.num_bytes for spec in each.state()) for each in (made, dense)]
    assert sizes == [4 * 2 * 2 * (64 + 256), 4 * 2 * 64 * 256]
    delta = {n: torch.zeros(1, *s) for n, s in made.level(0).shapes().items()}
    assert not made.level(0).delta_of("up", torch.randn(1, 3, 64), delta).any()


@pytest.mark.parametrize(("max_step", "max_norm"), [(0.5, 10.0), (10.0, 0.25)])
def test_steps_and_deltas_are_bounded(max_step: float, max_norm: float) -> None:
    made = chain("sequential", Level(4, 3, max_step=max_step, max_norm=max_norm, rate=1.0, learn_rate=False))
    state = {s.name: torch.zeros(2, *s.shape, dtype=torch.float64) for s in made.state()}
    gradient = {n: torch.full((2, *s), 9.0, dtype=torch.float64) for n, s in made.level(0).shapes().items()}
    gradient = {n: g * torch.tensor([1.0, 1e-4])[:, None, None] for n, g in gradient.items()}
    step = made.step(0, state, gradient)
    norms = torch.stack([t.flatten(1).square().sum(1) for t in step.tensors.values()]).sum(0).sqrt()
    torch.testing.assert_close(norms[0], torch.tensor(min(max_step, max_norm), dtype=torch.float64))
    torch.testing.assert_close(step.tensors["1.delta.up"][1], -gradient["up"][1])
    assert step.norm[0] <= max_step
    assert step.finite.all()


def test_a_step_that_is_not_finite_is_said_to_be_so() -> None:
    made = chain("sequential", Level(4, 3, optimizer="momentum"))
    state = {s.name: torch.zeros(2, *s.shape, dtype=torch.float64) for s in made.state()}
    gradient = {n: torch.ones(2, *s, dtype=torch.float64) for n, s in made.level(0).shapes().items()}
    gradient["up"][1, 0, 0] = float("nan")
    assert made.step(0, state, gradient).finite.tolist() == [True, False]
