"""One small rule of every registered kind, with parameters that leave nothing at zero."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.varied import CHANGES
from nested_runtime.registry import RULES

DIM = 8


def _variants() -> dict[str, tuple[str, Callable[[type[UpdateRule]], UpdateRule]]]:
    """id -> (registered name, maker). A rule that is registered must have a variant here: the contract is for all."""
    variants = {"sliding-attention": ("sliding-attention", lambda kind: kind(DIM, 2, 4, 5))}
    for name in ("titans", "gated-delta"):
        variants[name] = (name, lambda kind: kind(DIM, 2, 4, 3))
    for change in CHANGES:
        variants[f"varied-{change}"] = (
            "varied-self-modifying",
            lambda kind, change=change: kind(DIM, 2, 4, RuleOptions(4), 3, (change,)),
        )
    variants["varied-all"] = (
        "varied-self-modifying",
        lambda kind: kind(DIM, 2, 4, RuleOptions(4, "anchor"), 3, ("momentum", "no-decay", "fixed-k", "adaptive-q")),
    )
    for read, retain in itertools.product(("token", "anchor"), ("start", "zero")):
        options = RuleOptions(4, read, retain)
        variants[f"self-modifying-{read}-{retain}"] = (
            "self-modifying",
            lambda kind, options=options: kind(DIM, 2, 4, options, 3),
        )
    for hidden, momentum in itertools.product((None, 6), (False, True)):
        options = RuleOptions(4, "anchor" if hidden and momentum else "token", "zero" if momentum else "start")
        variants[f"deep-{'mlp' if hidden else 'matrix'}{'-momentum' if momentum else ''}"] = (
            "deep-self-modifying",
            lambda kind, o=options, h=hidden, m=momentum: kind(DIM, 2, 4, o, 3, hidden=h, momentum=m),
        )
    return variants


VARIANTS = _variants()


@pytest.fixture(params=list(VARIANTS))
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    """A float64 rule on an 8-wide stream."""
    name, make = VARIANTS[request.param]
    generator = torch.Generator().manual_seed(3)
    made = make(RULES.get(name)).double().requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


@pytest.fixture
def tested_rules() -> set[str]:
    """Registered names that the `rule` fixture covers."""
    return {name for name, _ in VARIANTS.values()}
