"""SlotPool: every slot is in one place, and nothing of a tenant outlives its slot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nested_runtime.errors import ConfigError, NestedError, Overloaded, StateError
from nested_runtime.state.pool import SlotPool
from nested_runtime.state.spec import TensorSpec

SPECS = (TensorSpec("a", (2, 3)), TensorSpec("b", ()), TensorSpec("n", (2,), torch.int64))
CAPACITY = 4


def state_of(value: float) -> dict[str, torch.Tensor]:
    return {spec.name: torch.full(spec.shape, value, dtype=spec.dtype) for spec in SPECS}


class PoolMachine(RuleBasedStateMachine):
    """A pool against a dictionary of what every acquired slot should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(SPECS, CAPACITY)
        self.expected: dict[int, float] = {}

    @precondition(lambda self: len(self.expected) < CAPACITY)
    @rule()
    def acquire(self) -> None:
        slot = self.pool.acquire()
        assert slot != 0
        assert slot not in self.expected
        self.expected[slot] = 0.0

    @precondition(lambda self: len(self.expected) == CAPACITY)
    @rule()
    def acquire_too_many(self) -> None:
        with pytest.raises(Overloaded, match="4 slots"):
            self.pool.acquire()

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), value=st.integers(1, 9))
    def load(self, data: st.DataObject, value: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.expected)))
        self.pool.load(slot, state_of(value))
        self.expected[slot] = float(value)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), value=st.integers(1, 9))
    def write(self, data: st.DataObject, value: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.expected)))
        self.pool.mark_dirty(slot)
        for tensor in self.pool.tensors.values():
            tensor[slot] = value
        self.expected[slot] = float(value)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        src, dst = (data.draw(st.sampled_from(sorted(self.expected))) for _ in range(2))
        self.pool.copy(src, dst)
        self.expected[dst] = self.expected[src]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.expected)))
        self.pool.release(slot)
        del self.expected[slot]

    @invariant()
    def slots_hold_what_they_should(self) -> None:
        self.pool.check_integrity(deep=True)
        assert self.pool.num_free == CAPACITY - len(self.expected)
        for slot, value in self.expected.items():
            saved = self.pool.save(slot)
            assert all(torch.equal(saved[name], tensor) for name, tensor in state_of(value).items())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_saved_state_is_detached_from_the_pool() -> None:
    pool = SlotPool(SPECS, 1)
    slot = pool.acquire()
    pool.load(slot, state_of(3))
    saved = pool.save(slot)
    pool.release(slot)
    assert torch.equal(saved["a"], state_of(3)["a"])
    assert not pool.tensors["a"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(3, 2)}, r"'a' is torch.float32 \(3, 2\)"),
        ({"a": torch.zeros(2, 3, dtype=torch.float64)}, "'a' is torch.float64"),
        ({"extra": torch.zeros(1)}, r"unknown \['extra'\]"),
    ],
)
def test_load_refuses_what_does_not_fit_and_writes_nothing(change: dict[str, torch.Tensor], message: str) -> None:
    pool = SlotPool(SPECS, 1)
    slot = pool.acquire()
    with pytest.raises(StateError, match=message):
        pool.load(slot, {**state_of(1), **change})
    with pytest.raises(StateError, match=r"missing \['a', 'b', 'n'\]"):
        pool.load(slot, {})
    pool.check_integrity(deep=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_is_finite_sees_every_tensor_and_only_its_slot(value: float) -> None:
    pool = SlotPool(SPECS, 2)
    first, second = pool.acquire(), pool.acquire()
    pool.load(first, {**state_of(1), "b": torch.tensor(value)})
    pool.load(second, {**state_of(1), "a": torch.full((2, 3), 3e38)})  # finite, though its sum overflows
    assert not pool.is_finite(first)
    assert pool.is_finite(second)


def test_slots_must_be_acquired() -> None:
    pool = SlotPool(SPECS, 2)
    slot = pool.acquire()
    for use in (pool.save, pool.release, pool.mark_dirty):
        with pytest.raises(NestedError, match="slot 0 is not acquired"):
            use(0)
    pool.release(slot)
    with pytest.raises(NestedError, match=f"slot {slot} is not acquired"):
        pool.release(slot)


def test_check_integrity_names_the_discrepancy() -> None:
    pool = SlotPool(SPECS, 2)
    pool.tensors["a"][0, 0, 0] = 1
    pool.check_integrity()
    with pytest.raises(NestedError, match="slot 0 should be zero but tensor 'a'"):
        pool.check_integrity(deep=True)
    pool = SlotPool(SPECS, 2)
    pool._free.append(1)
    with pytest.raises(NestedError, match=r"free \[1, 1, 2\]"):
        pool.check_integrity()


def test_impossible_pools() -> None:
    with pytest.raises(ConfigError, match="got 0"):
        SlotPool(SPECS, 0)
    with pytest.raises(ConfigError, match="not unique"):
        SlotPool((*SPECS, SPECS[0]), 1)
