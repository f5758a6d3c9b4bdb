"""Consolidation on tensors: what is kept, what is learned from it, what stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from nested_runtime.errors import ConfigError, UpdateDiverged
from nested_runtime.models.adaptation import retained
from nested_runtime.models.leveled import LeveledModel
from nested_runtime.models.replay import Consolidation, Replay
from nested_runtime.registry import FAMILIES

LEVELS = [{"chunk": 8, "hidden": 6, "rate": 0.05}, {"chunk": 16, "hidden": 6, "rate": 0.04, "learn_rate": False}]


def make(family: str = "hope", **fields: Any) -> LeveledModel:
    torch.manual_seed(3)
    kind = FAMILIES.get(family)
    model = kind.from_config({**kind.TINY, "levels": LEVELS, "recent": 16, **fields})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval().requires_grad_(False)


def after_reading(model: LeveledModel, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, model.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
    _, state = model.scan(tokens[None], None, 0)
    return tokens, {name: t[0] for name, t in state.items()}


def finished(model: LeveledModel, state: dict[str, torch.Tensor], **wanted: Any) -> dict[str, torch.Tensor]:
    replay = Replay(model, state, Consolidation(**wanted))
    while not replay.is_over:
        replay.advance()
    return replay.result()


@pytest.mark.parametrize(("length", "kept"), [(5, 5), (8, 8), (13, 13), (24, 24), (29, 21), (100, 20)])
def test_the_newest_tokens_are_kept(length: int, kept: int) -> None:
    """`recent` of the closed chunks and the unfinished one: a chunk closes when the token after it is read."""
    tokens, state = after_reading(make(), length)
    assert retained(state).tolist() == tokens[-kept:].tolist()


def test_without_recent_only_the_unfinished_chunk_is_kept() -> None:
    tokens, state = after_reading(make(recent=0), 20)
    assert retained(state).tolist() == tokens[-4:].tolist()


@pytest.mark.parametrize("family", ["hope", "transformer"])
def test_the_step_is_along_the_gradient_of_the_tokens_read_afresh(family: str) -> None:
    model = make(family)
    _, state = after_reading(model, 20)
    tokens = retained(state)
    new = finished(model, state)
    levels = {spec.name for spec in model.state_spec() if spec.level.startswith("cms.")}

    def loss(changed: dict[str, torch.Tensor]) -> float:
        """Of the retained tokens behind a fresh fast memory, read token by token without any step of levels."""
        now = {n: changed[n][None] if n in levels else t for n, t in model.fresh(tokens[None]).items()}
        total = 0.0
        for i, token in enumerate(tokens[:-1]):
            hidden, now = model._scan(token.view(1, 1), now, i, 0)
            total += float(cross_entropy(model.logits(hidden[:, 0]), tokens[i + 1, None]))
        return total

    name, small = next(n for n in levels if n.endswith("cms.2.delta.down")), 1e-5
    for place in [(0, 0), (3, 2), (7, 5)]:
        sides = []
        for sign in (1, -1):
            moved = {n: t.clone() for n, t in state.items()}
            moved[name][place] += sign * small
            sides.append(loss(moved))
        slope = (sides[0] - sides[1]) / (2 * small)
        assert abs(slope) > 1e-4
        step = float(new[name][place] - state[name][place])
        assert step == pytest.approx(-0.04 * slope * 16 / len(tokens), rel=1e-4)


def test_only_the_slower_level_learns_and_its_clock_says_so() -> None:
    model = make()
    _, state = after_reading(model, 30)
    new = finished(model, state, passes=3)
    changed = {name for name in state if not torch.equal(new[name], state[name])}
    assert changed == {"cms.2.clock", *(f"blocks.1.cms.2.delta.{n}" for n in ("up", "down"))}
    assert (new["cms.2.clock"] - state["cms.2.clock"]).tolist() == [0, 3, 0]


def test_faster_levels_decay_towards_their_start() -> None:
    model = make()
    _, state = after_reading(model, 30)
    new = finished(model, state, decay=0.25)
    for name in ("up", "down"):
        key = f"blocks.1.cms.1.delta.{name}"
        torch.testing.assert_close(new[key], 0.75 * state[key])
        assert state[key].any()


def test_a_lone_level_learns_itself_and_nothing_decays() -> None:
    model = make(levels=LEVELS[:1])
    _, state = after_reading(model, 30)
    new = finished(model, state, decay=1.0)
    assert not torch.equal(new["blocks.1.cms.1.delta.down"], state["blocks.1.cms.1.delta.down"])
    assert new["blocks.1.cms.1.delta.down"].any()


def test_a_step_that_is_not_finite_is_refused() -> None:
    model = make()
    _, state = after_reading(model, 30)
    state["blocks.1.cms.1.delta.up"] = torch.full_like(state["blocks.1.cms.1.delta.up"], 1e200)
    with pytest.raises(UpdateDiverged, match=r"cms\.2 is not finite"):
        finished(model, state)


def test_a_session_that_read_nothing_has_nothing_to_learn() -> None:
    model = make()
    state = {name: t[0] for name, t in model.fresh(torch.zeros(1, 1, dtype=torch.int64)).items()}
    assert Replay(model, state, Consolidation()).is_over


def test_impossible_wishes_are_named() -> None:
    for fields, named in (({"passes": 0}, "passes must be in"), ({"decay": 1.5}, "decay must be in")):
        with pytest.raises(ConfigError, match=named):
            Consolidation(**fields)
    with pytest.raises(ConfigError, match=r"recent is 12: give 0 or a multiple of levels\.0\.chunk"):
        make(recent=12)
