"""Every registered optimizer with its default options."""

from __future__ import annotations

import pytest

from nested_runtime.optim.base import InnerRule, build_rule
from nested_runtime.registry import OPTIMIZERS


@pytest.fixture(params=list(OPTIMIZERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rule(name: str) -> InnerRule:
    return build_rule(name)
