"""The contract of every registered optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nested_runtime.errors import ConfigError
from nested_runtime.optim.base import InnerRule, RuleState, build_rule
from nested_runtime.optim.optimizer import DeepOptimizer, deep_optimizer

EXAMPLES = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.sampled_from([(), (1,), (5,), (4, 6), (6, 4), (1, 3), (3, 2, 2)])
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walk(
    rule: InnerRule,
    param: torch.Tensor,
    seed: int,
    steps: int,
    lr: float | torch.Tensor = 0.03,
    rows: slice = slice(None),
) -> tuple[torch.Tensor, RuleState]:
    """`steps` steps of sessions `rows` along gradients drawn for all sessions."""
    whole, param = param, param[rows]
    state: RuleState = rule.init(param)
    for i in range(steps):
        grad = draw(seed + i, *whole.shape)[rows]
        inputs = draw(seed + 99 + i, len(whole), 3, whole.shape[-1])[rows] if whole.ndim == 3 else None
        param, state = rule.step(param, grad, state, lr[rows] if isinstance(lr, torch.Tensor) else lr, inputs)
    return param, state


def assert_same(found: RuleState, expected: RuleState) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, **EXACT, msg=lambda m, key=key: f"{key}: {m}")


@EXAMPLES
@given(SHAPES, st.integers(0, 2**20), st.integers(1, 4))
def test_shapes_stay_and_values_are_finite(rule: InnerRule, shape: tuple[int, ...], seed: int, steps: int) -> None:
    param = draw(seed, 3, *shape)
    new, state = walk(rule, param, seed, steps)
    assert new.shape == param.shape
    assert new.dtype == param.dtype
    assert {n: tuple(t.shape[1:]) for n, t in state.items()} == rule.state_shapes(shape)
    assert all(t.isfinite().all() for t in (new, *state.values()))
    assert (new != param).any(), "nothing moved"


@EXAMPLES
@given(SHAPES, st.integers(0, 2**20), st.integers(1, 5))
def test_a_session_does_not_depend_on_its_companions(
    rule: InnerRule, shape: tuple[int, ...], seed: int, steps: int
) -> None:
    param, lr = draw(seed, 3, *shape), torch.tensor([0.01, 0.0, 0.1], dtype=torch.float64)
    together, state = walk(rule, param, seed, steps, lr)
    for s in range(3):
        rows = slice(s, s + 1)
        alone, own = walk(rule, param, seed, steps, lr, rows)
        torch.testing.assert_close(alone, together[rows], **EXACT)
        assert_same(own, {n: t[rows] for n, t in state.items()})


@EXAMPLES
@given(SHAPES, st.integers(0, 2**20))
def test_a_step_is_pure_and_deterministic(rule: InnerRule, shape: tuple[int, ...], seed: int) -> None:
    param, grad = draw(seed, 2, *shape), draw(seed + 1, 2, *shape)
    state = walk(rule, param, seed, 2)[1]
    before = [t.clone() for t in (param, grad, *state.values())]
    first, second = (rule.step(param, grad, state, 0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, (param, grad, *state.values()), strict=True))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][n], second[1][n]) for n in state)


@EXAMPLES
@given(SHAPES)
def test_a_zero_gradient_moves_nothing_that_has_not_moved(rule: InnerRule, shape: tuple[int, ...]) -> None:
    param = draw(0, 2, *shape)
    new, state = rule.step(param, torch.zeros_like(param), rule.init(param), 0.1)
    torch.testing.assert_close(new, param, **EXACT)
    assert all(t.isfinite().all() for t in state.values())


@EXAMPLES
@given(SHAPES, st.integers(0, 2**20))
def test_learning_rate_zero_moves_nothing(rule: InnerRule, shape: tuple[int, ...], seed: int) -> None:
    param = draw(seed, 2, *shape)
    assert torch.equal(walk(rule, param, seed, 3, lr=0.0)[0], param)


def test_narrow_parameters_keep_wide_state(rule: InnerRule) -> None:
    param = draw(0, 2, 4, 6).bfloat16()
    new, state = rule.step(param, draw(1, 2, 4, 6).bfloat16(), rule.init(param), 0.1)
    assert new.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in state.values())


def test_a_step_is_differentiable_in_gradient_and_rate(rule: InnerRule) -> None:
    """What meta-learning a level's start and rate needs."""
    param, state = draw(0, 2, 4, 6), walk(rule, draw(0, 2, 4, 6), 5, 2)[1]
    grad, lr = draw(1, 2, 4, 6).requires_grad_(), torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    rule.step(param, grad, state, lr)[0].square().sum().backward()
    assert grad.grad is not None
    assert grad.grad.any()
    assert grad.grad.isfinite().all()
    assert lr.grad is not None
    assert lr.grad.all()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def train(optimizer: torch.optim.Optimizer, net: nn.Module, steps: int) -> list[float]:
    x, y, losses = draw(1, 40, 5), draw(2, 40, 5)[:, :3].tanh(), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_optimizer_is_the_rule(name: str, rule: InnerRule) -> None:
    """Functional steps by hand, parameter by parameter, give the trained network."""
    net, twin = network(), network()
    optimizer = deep_optimizer(name, net.parameters(), 0.01, net)
    train(optimizer, net, 4)
    weights = {n: p.detach()[None] for n, p in twin.named_parameters()}
    states = {n: rule.init(p) for n, p in weights.items()}
    x, y = draw(1, 40, 5), draw(2, 40, 5)[:, :3].tanh()
    for _ in range(4):
        leaves = {n: p[0].clone().requires_grad_() for n, p in weights.items()}
        hidden = (x @ leaves["0.weight"].T + leaves["0.bias"]).tanh()
        loss = (hidden @ leaves["2.weight"].T + leaves["2.bias"] - y).square().mean()
        torch.autograd.backward(loss)
        read = {"0.weight": x[None] / 40**0.5, "2.weight": hidden.detach()[None] / 40**0.5}
        for n, leaf in leaves.items():
            weights[n], states[n] = rule.step(weights[n], leaf.grad[None], states[n], 0.01, read.get(n))
    for n, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), weights[n][0], rtol=1e-9, atol=1e-12)


def test_the_optimizer_learns(name: str) -> None:
    net = network()
    losses = train(deep_optimizer(name, net.parameters(), 0.01, net), net, 60)
    assert losses[-1] < 0.9 * losses[0]


def test_the_optimizer_state_saves_and_loads(name: str) -> None:
    net = network()
    optimizer = deep_optimizer(name, net.parameters(), 0.01, net)
    train(optimizer, net, 3)
    twin = network()
    twin.load_state_dict(net.state_dict())
    other = deep_optimizer(name, twin.parameters(), 0.5, twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(optimizer, net, 3) == train(other, twin, 3)


def test_unknown_names_and_options_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown optimizer 'sgdd'; known: .*momentum"):
        build_rule("sgdd")
    with pytest.raises(ConfigError, match=f"unknown option 'colour' of optimizer '{name}'"):
        build_rule(name, {"colour": 1})
    with pytest.raises(ConfigError, match="'lr' must be at least 0, got -1"):
        DeepOptimizer(network().parameters(), build_rule(name), -1.0)


@pytest.mark.parametrize("value", [-0.1, 1.0, "0.9", True, float("nan")])
def test_impossible_options_are_named(value: object) -> None:
    with pytest.raises(ConfigError, match="'momentum' must be at least 0"):
        build_rule("momentum", {"momentum": value})
