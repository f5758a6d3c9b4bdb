"""Rotary positions: distances, stretching, and what makes no rotation (tests/convert compares with transformers)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nested_runtime.errors import ConfigError
from nested_runtime.memory.rope import Rope, rotate

LLAMA3 = {"type": "llama3", "theta": 500_000.0, "factor": 8.0, "original": 64, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "theta": 10_000.0, "factor": 4.0, "original": 64}


@pytest.mark.parametrize("fields", [{}, {"type": "linear", "factor": 2.0}, LLAMA3, YARN])
def test_scores_depend_on_distances_only(fields: dict[str, Any]) -> None:
    rope, g = Rope.of(fields), torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 1, 16, generator=g, dtype=torch.float64)
    near, far = (rope.turns(torch.arange(5) + start, 16) for start in (0, 1_000_000))
    scores = [torch.einsum("thk,shk->ts", rotate(q, turns), rotate(k, turns)) for turns in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-8)


def test_stretching_slows_slow_pairs_by_the_factor_and_leaves_fast_ones() -> None:
    for fields in (LLAMA3, YARN):
        rope = Rope.of(fields)
        ratio = rope.speeds(64) / Rope(theta=rope.theta).speeds(64)
        assert ratio[0] == pytest.approx(1.0)
        assert ratio[-1] == pytest.approx(1 / rope.factor)
        assert ((ratio.diff() <= 1e-12) & (ratio[1:] >= 1 / rope.factor - 1e-12)).all()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"type": "dynamic"}, "rope.type.*'dynamic'"),
        ({"theta": 0.0}, "rope.theta"),
        ({"theta": "big"}, "rope.theta"),
        ({"factor": True}, "rope.factor"),
        ({"type": "yarn", "factor": 2.0}, "rope.original"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "rope.low_freq_factor"),
        ({"colour": 1}, "unknown config field 'rope.colour'"),
    ],
)
def test_what_makes_no_rotation_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Rope.of(fields)
