"""Deep memories and momentum: against autograd, against the rule they extend, against a scalar loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import gelu

from nested_runtime.errors import ConfigError
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.memory.deep import DeepSelfModifying, Drive, Layer, advance, gelu_slope, mlp_gradients
from nested_runtime.memory.self_modifying import SelfModifying

DIM = 8


def noisy(rule: SelfModifying, seed: int = 3) -> SelfModifying:
    generator = torch.Generator().manual_seed(seed)
    rule = rule.double().requires_grad_(False)
    for parameter in rule.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return rule


def fresh(rule: SelfModifying, batch: int) -> dict[str, torch.Tensor]:
    return {s.name: torch.zeros(batch, *s.shape, dtype=torch.float64) for s in rule.state()}


def test_analytic_gradients_equal_autograd() -> None:
    generator = torch.Generator().manual_seed(1)
    z, target = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64).unbind(0)
    inner = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    outer = torch.randn(4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    read = z + gelu(z @ inner.T) @ outer.T
    expected = torch.autograd.grad(0.5 * (read - target).square().sum(), [outer, inner])
    e, h, d = mlp_gradients(outer.detach(), (z @ inner.T).detach(), (read - target).detach())
    torch.testing.assert_close(torch.einsum("nk,nf->kf", e, h), expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.einsum("nf,nk->fk", d, z), expected[1], rtol=0, atol=1e-12)


def test_the_slope_of_gelu() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(gelu(x).sum(), x)
    torch.testing.assert_close(gelu_slope(x.detach()), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("read", "retain"), list(itertools.product(("token", "anchor"), ("start", "zero"))))
def test_without_the_options_it_is_the_rule_it_extends(read: str, retain: str) -> None:
    options = RuleOptions(4, read, retain)
    plain, deep = (noisy(kind(DIM, 2, 4, options, 3)) for kind in (SelfModifying, DeepSelfModifying))
    deep.load_state_dict(plain.state_dict())
    x = torch.randn(2, 19, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected, _ = plain.scan(x, fresh(plain, 2), 0)
    found, _ = deep.scan(x, fresh(deep, 2), 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_layer_is_erased_along_its_input_and_moved_with_momentum() -> None:
    """Token by token with matrices written out: X (alpha I - eta x x^T) + S, S = mu S - eta e x^T."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    live, step, x, error = draw(2, 3, 5, 4), draw(2, 3, 5, 4), draw(2, 1, 3, 4), draw(2, 1, 3, 5)
    eta, alpha, mu = draw(2, 1, 3).sigmoid(), draw(2, 3).sigmoid(), draw(2, 3).sigmoid()
    new = advance(Layer(live, step), Drive(x, error, eta), 0, alpha, mu)
    for b, h in itertools.product(range(2), range(3)):
        a, key = alpha[b, h] * torch.eye(4, dtype=torch.float64), x[b, 0, h]
        moved = mu[b, h] * step[b, h] - eta[b, 0, h] * torch.outer(error[b, 0, h], key)
        expected = live[b, h] @ (a - eta[b, 0, h] * torch.outer(key, key)) + moved
        torch.testing.assert_close(new.live[b, h], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(new.step[b, h], moved, rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [False, True])
def test_every_parameter_of_it_learns(momentum: bool) -> None:
    rule = noisy(DeepSelfModifying(DIM, 2, 4, RuleOptions(4), 3, hidden=6, momentum=momentum)).requires_grad_(True)
    x = torch.randn(1, 13, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rule.scan(x, fresh(rule, 1), 0)[0].square().sum().backward()
    for name, parameter in rule.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_it_remembers_what_was_written_under_a_key() -> None:
    """The value read under a key comes nearer to the value told with it, token by token."""
    torch.manual_seed(0)
    rule = DeepSelfModifying(16, 1, 16, RuleOptions(4), 1, hidden=32).double().requires_grad_(False)
    rule.conv.fill_(0)
    rule.conv[-1] = 1
    rule.rates.fill_(0)
    at = {"inner": rule.base[None], "outer": rule.outer[None]}
    k, v = (torch.nn.functional.normalize(torch.randn(1, 1, 1, 16, dtype=torch.float64), dim=-1) for _ in range(2))
    eta, alpha = torch.full((1, 1, 1), 0.4, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for _ in range(12):
        now = {name: at[name] for name in at}
        wrong = rule._out(now, rule._pre(now, k), k, "mem") - rule._out(now, rule._pre(now, v), v, "mem")
        errors.append(float(wrong.norm()))
        drives = rule._drives(now, k, v, eta)
        at = {n: at[n] + advance(Layer(torch.zeros_like(at[n]), None), drives[n], 0, alpha, None).live for n in at}
    assert errors[-1] < 0.3 * errors[0]


def test_an_impossible_width_is_named() -> None:
    with pytest.raises(ConfigError, match="memory_hidden must be at least 1"):
        DeepSelfModifying(DIM, 2, 4, RuleOptions(4), hidden=0)
