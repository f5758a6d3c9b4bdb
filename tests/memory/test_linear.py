"""Titans, Gated DeltaNet and the varied rule against their papers' equations, token by token; the ablated parts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from nested_runtime.errors import ConfigError
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.kernels.delta_rule.reference import reference_scan
from nested_runtime.kernels.short_conv.reference import short_conv
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.gated_delta import GatedDelta
from nested_runtime.memory.linear import LinearMemory
from nested_runtime.memory.self_modifying import SelfModifying
from nested_runtime.memory.streams import unit
from nested_runtime.memory.titans import Titans
from nested_runtime.memory.varied import CHANGES, VariedSelfModifying

DIM, HEADS, K, CHUNK = 8, 2, 4, 4
EXACT = {"rtol": 0.0, "atol": 1e-10}


def noisy(rule: UpdateRule) -> UpdateRule:
    torch.manual_seed(0)
    rule = rule.double().requires_grad_(False)
    for p in rule.parameters():
        p.add_(0.3 * torch.randn_like(p))
    return rule


def fresh(rule: UpdateRule, batch: int = 1) -> dict[str, torch.Tensor]:
    return {s.name: torch.zeros(batch, *s.shape, dtype=torch.float64) for s in rule.state()}


def stream(length: int) -> torch.Tensor:
    return torch.randn(1, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(rule: LinearMemory, x: torch.Tensor) -> torch.Tensor:
    """One token after the other, from the equations in the papers."""
    streams, gate, logits = rule.project(x)
    mixed, _ = short_conv(streams, fresh(rule)["window"], rule.conv)
    q, k, v = mixed[0].view(-1, 3, HEADS, K).unbind(1)
    gates = logits[0].sigmoid()
    reads = torch.zeros(1, x.shape[1], HEADS, K, dtype=torch.float64)
    for h in range(HEADS):
        M = S = torch.zeros(K, K, dtype=torch.float64)
        for t in range(x.shape[1]):
            key, value = unit(k[t, h]), v[t, h]
            if isinstance(rule, Titans):
                theta, alpha, mu = gates[t, :, h]
                with torch.enable_grad():  # the gradient is autograd's, not ours
                    leaf = M.clone().requires_grad_()
                    (slope,) = torch.autograd.grad(0.5 * (leaf @ key - value).square().sum(), leaf)
                S = mu * S - theta * slope
                M = alpha * M + S
            else:
                beta, alpha = gates[t, :, h]
                M = M @ (alpha * (torch.eye(K, dtype=torch.float64) - beta * torch.outer(key, key)))
                M = M + beta * torch.outer(value, key)
            reads[0, t, h] = M @ unit(q[t, h])
    return rule.finish(reads, gate)


@pytest.mark.parametrize("kind", [Titans, GatedDelta])
def test_controls_are_the_papers_equations(kind: type[LinearMemory]) -> None:
    rule = noisy(kind(DIM, HEADS, K, 3))
    x = stream(80)  # more than one run
    torch.testing.assert_close(rule.scan(x, fresh(rule), 0)[0], by_hand(rule, x), **EXACT)


@pytest.mark.parametrize("read", ["token", "anchor"])
def test_the_varied_rule_without_changes_is_the_rule(read: str) -> None:
    options = RuleOptions(CHUNK, read)
    plain = noisy(SelfModifying(DIM, HEADS, K, options, 3))
    varied = VariedSelfModifying(DIM, HEADS, K, options, 3).double().requires_grad_(False)
    varied.load_state_dict(plain.state_dict())
    x = stream(19)
    out, state = varied.scan(x, fresh(varied), 0)
    expected, anchored = plain.scan(x, fresh(plain), 0)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(state["anchor"], anchored["anchor"], **EXACT)


def vary(*changes: str) -> VariedSelfModifying:
    rule = noisy(VariedSelfModifying(DIM, HEADS, K, RuleOptions(CHUNK), 3, changes))
    assert isinstance(rule, VariedSelfModifying)
    return rule


@pytest.mark.parametrize(("change", "name"), [("fixed-k", "k"), ("fixed-v", "v")])
def test_a_fixed_memory_does_not_change_and_the_others_do(change: str, name: str) -> None:
    rule = vary(change)
    _, state = rule.scan(stream(12), fresh(rule), 0)
    per_row = state["live"][0].abs().amax((0, 2))
    own = {"k": slice(0, K), "v": slice(K + 2, 2 * K + 2)}
    assert not per_row[own[name]].any()
    assert all(per_row[rows].all() for other, rows in own.items() if other != name)


def test_fixed_keys_are_the_reference_with_a_rate_of_zero() -> None:
    rule = vary("fixed-k")
    x = stream(11)
    streams, gate, logits = rule.project(x)
    mixed, _ = short_conv(streams, fresh(rule)["window"], rule.conv)
    q, k, v = mixed[0].view(-1, 3, HEADS, K).unbind(1)
    rates = rule.row_rates()
    assert not rates[:, :K].any()
    reads = []
    for h in range(HEADS):
        zero = torch.zeros(3 * K + 2, K, dtype=torch.float64)
        args = (q[:, h], k[:, h], v[:, h], logits[0, :, 0, h], logits[0, :, 1, h])
        reads.append(reference_scan(*args, rule.base[h], rates[h], zero, zero, 0, rule.options)[0])
    expected = rule.finish(torch.stack(reads, 1)[None], gate)
    torch.testing.assert_close(rule.scan(x, fresh(rule), 0)[0], expected, **EXACT)


def stop_writing(rule: VariedSelfModifying) -> None:
    """From here on eta is 0."""
    rule.gate_bias[0] -= 1000


@pytest.mark.parametrize("change", ["no-decay", "gd"])
def test_what_is_not_overwritten_stays_without_decay_and_shrinks_with_it(change: str) -> None:
    rule = vary(change)
    x = stream(2 * CHUNK)
    before = rule.scan(x[:, :CHUNK], fresh(rule), 0)[1]
    stop_writing(rule)
    after = rule.scan(x[:, CHUNK:], before, CHUNK)[1]
    if change == "no-decay":
        torch.testing.assert_close(after["live"], before["live"], **EXACT)
    else:
        assert (after["live"].norm(dim=(-1, -2)) < (1 - 1e-5) * before["live"].norm(dim=(-1, -2))).all()


def test_momentum_goes_on_writing_after_the_token() -> None:
    rule = vary("momentum", "no-decay")
    x = stream(3)
    before = rule.scan(x[:, :1], fresh(rule), 0)[1]
    torch.testing.assert_close(before["momentum"], before["live"], **EXACT)
    stop_writing(rule)
    after = rule.scan(x[:, 1:2], before, 1)[1]
    torch.testing.assert_close(after["live"] - before["live"], after["momentum"], **EXACT)
    carried = after["momentum"].norm(dim=(-1, -2)) / before["momentum"].norm(dim=(-1, -2))
    assert ((carried > 0.01) & (carried < 0.99)).all()


def test_adaptive_queries_follow_what_was_read() -> None:
    rule = vary("adaptive-q")
    x = stream(3 * CHUNK)
    _, state = rule.scan(x, fresh(rule), 0)
    query = unit(linear(x[0, 0, :K], rule.base_q[0]))
    moved = unit(linear(x[0, 0, :K], rule.base_q[0] + state["live"][0, 0, 3 * K + 2 :]))
    assert (query - moved).abs().max() > 1e-3


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_changes_what_is_read(change: str) -> None:
    x = stream(3 * CHUNK)
    plain, varied = vary(), vary(change)
    varied.load_state_dict({**varied.state_dict(), **plain.state_dict()})
    assert (plain.scan(x, fresh(plain), 0)[0] - varied.scan(x, fresh(varied), 0)[0]).abs().max() > 1e-4


def test_impossible_changes_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown 'frozen'; known: momentum"):
        VariedSelfModifying(DIM, HEADS, K, RuleOptions(CHUNK), 3, ("frozen",))
    with pytest.raises(ConfigError, match="unknown \\['gd'\\]"):
        VariedSelfModifying(DIM, HEADS, K, RuleOptions(CHUNK), 3, (["gd"],))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="retain 'start', got 'zero'"):
        VariedSelfModifying(DIM, HEADS, K, RuleOptions(CHUNK, retain="zero"), 3, ("gd",))
