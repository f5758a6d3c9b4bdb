"""What must hold of benchmarks/optimizers.py: the paper's toy, that every optimizer learns, plots that are plots."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks are not installed

from benchmarks import optimizers
from benchmarks.curves import curves
from nested_runtime.registry import OPTIMIZERS


def test_delta_momentum_needs_fewer_steps_than_momentum_on_the_toy() -> None:
    momentum, delta = (optimizers.best_on_toy(name) for name in ("momentum", "delta-momentum"))
    assert delta["steps"] < 0.7 * momentum["steps"]
    assert delta["losses"][int(delta["steps"])] < optimizers.TOY_GOAL


def test_pictures_are_of_ten_classes_and_not_the_same_for_two_seeds() -> None:
    x, y = optimizers.images(400, 1)
    assert x.shape == (400, 1, optimizers.SIZE, optimizers.SIZE)
    assert set(y.tolist()) == set(range(optimizers.CLASSES))
    assert (optimizers.images(400, 2)[0] - x).abs().max() > 0.1


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_learns_the_pictures(name: str) -> None:
    """At one of the rates that the benchmark tries."""
    assert name in optimizers.RATES, "a new optimizer needs learning rates to be tried"
    losses = optimizers.train(name, optimizers.RATES[name][1], 0, 80)["losses"]
    assert sum(losses[-10:]) < 0.99 * sum(losses[:10])


def test_curves_are_svg_with_a_line_a_name_and_gaps_where_nothing_is_finite() -> None:
    svg = ET.fromstring(curves("losses", {"one": [1.0, 0.1, 0.01], "two": [2.0, math.inf, 0.5, 0.1]}))
    lines = [e for e in svg.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 3
    assert {"one", "two", "losses"} <= {e.text for e in svg.iter() if e.tag.endswith("text")}
