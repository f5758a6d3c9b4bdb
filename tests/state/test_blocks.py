"""BlockPool through SlotPool: every block is in one place, promises are kept, nothing of a tenant outlives its slot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nested_runtime.errors import ConfigError, NestedError, Overloaded, StateError
from nested_runtime.state.blocks import BLOCK
from nested_runtime.state.codec import decode, encode
from nested_runtime.state.pool import SlotPool
from nested_runtime.state.snapshot import Binding, Snapshot
from nested_runtime.state.spec import TensorSpec

ROWS = 40
SPECS = (
    TensorSpec("fixed", (2,)),
    TensorSpec("kv", (ROWS, 3), level="kv", grows=True),
    TensorSpec("filled", (ROWS,), level="kv", grows=True),
)
ROW_BYTES = 4 * (3 + 1)
BLOCKS, MAX_STEP = 14, 20


def make_pool(capacity: int = 4, blocks: int = BLOCKS) -> SlotPool:
    return SlotPool(SPECS, capacity, kv_bytes=blocks * BLOCK * ROW_BYTES, max_step=MAX_STEP)


def state_of(rows: list[float]) -> dict[str, torch.Tensor]:
    kv = torch.tensor(rows)[:, None].expand(-1, 3).contiguous()
    return {"fixed": torch.ones(2), "kv": kv, "filled": torch.ones(len(rows))}


def write(pool: SlotPool, slots: list[int], news: list[list[float]]) -> None:
    """What a forward pass does with KVRows; checks that `read` finds the new rows last."""
    kv = pool.extend(slots, [len(new) for new in news])
    assert kv is not None
    flat = torch.tensor([value for new in news for value in new])
    pool.tensors["kv"].flatten(0, 1)[kv.write] = flat[:, None].expand(-1, 3)
    pool.tensors["filled"].flatten(0, 1)[kv.write] = 1
    for b, new in enumerate(news):
        seen = pool.tensors["kv"].flatten(0, 1)[kv.read[b, : kv.num[b]]][:, 0]
        assert seen[len(seen) - len(new) :].tolist() == new


class BlockMachine(RuleBasedStateMachine):
    """Sessions read tokens under promises, against lists of what each should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool()
        self.rows: dict[int, list[float]] = {}
        self.promised: dict[int, int] = {}
        self.next = 1.0

    @rule(rows=st.integers(1, 90))
    def acquire(self, rows: int) -> None:
        if not self.pool.has_room(rows):
            with pytest.raises(Overloaded):
                self.pool.acquire(rows)
            return
        slot = self.pool.acquire(rows)
        self.rows[slot], self.promised[slot] = [], rows

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """Several sessions read as much as they were promised, which always works."""
        slots = data.draw(st.lists(st.sampled_from(sorted(self.rows)), min_size=1, unique=True))
        news = []
        for slot in slots:
            count = data.draw(st.integers(0, min(MAX_STEP, self.promised[slot])))
            self.promised[slot] -= count
            news.append([self.next + i for i in range(count)])
            self.next += count
            self.rows[slot] += news[-1]
        write(self.pool, slots, news)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """Save, release, and load the state again if there is room."""
        slot = data.draw(st.sampled_from(sorted(self.rows)))
        state, rows = self.pool.save(slot), self.rows.pop(slot)
        self.pool.release(slot)
        if self.pool.has_room(len(state["kv"]) + 1):
            again = self.pool.acquire(len(state["kv"]) + 1)
            self.pool.load(again, state)
            self.rows[again], self.promised[again] = rows, 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.rows)))
        self.pool.release(slot)
        del self.rows[slot]

    @invariant()
    def holds_what_was_read(self) -> None:
        self.pool.check_integrity(deep=True)
        for slot, rows in self.rows.items():
            state = self.pool.save(slot)
            assert state["kv"][:, 0].tolist() == rows[-ROWS:]
            assert state["filled"].tolist() == [1.0] * len(rows[-ROWS:])


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_blocks_that_were_given_back_are_zero() -> None:
    pool = make_pool(1)
    slot = pool.acquire()
    for begin in range(0, 200, 20):
        write(pool, [slot], [[float(begin + i + 1) for i in range(20)]])
        pool.check_integrity(deep=True)
    pool.release(slot)
    assert not any(tensor.any() for tensor in pool.tensors.values())


def test_a_copy_has_rows_of_its_own() -> None:
    pool = make_pool()
    first, second = pool.acquire(30), pool.acquire(30)
    write(pool, [first], [[1.0] * 18])
    pool.copy(first, second)
    write(pool, [first], [[2.0]])
    assert pool.save(second)["kv"][:, 0].tolist() == [1.0] * 18


def test_more_than_promised_takes_only_what_nobody_was_promised() -> None:
    pool = make_pool(2, blocks=4)
    first, second = pool.acquire(1), pool.acquire(17)
    write(pool, [first], [[1.0] * 16])
    with pytest.raises(Overloaded, match="KV blocks"):
        pool.extend([first], [17])
    write(pool, [second], [[1.0] * 17])


@pytest.mark.parametrize("rows", [0, 1, 16, ROWS])
def test_a_state_comes_back_from_the_codec_with_its_rows(rows: int) -> None:
    state = state_of([0.0] * rows)  # keys that are zero by chance
    snapshot = Snapshot.take(state, fingerprint="f", binding=Binding(), position=rows, pending=None)
    blob = encode(snapshot)
    again = decode(blob, SPECS, "f").tensors
    assert {name: t.shape for name, t in again.items()} == {name: t.shape for name, t in state.items()}
    assert len(blob) < 1200 + rows * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv": torch.ones(ROWS + 1, 3), "filled": torch.ones(ROWS + 1)}, "or fewer rows"),
        ({"kv": torch.ones(3, 3)}, r"have \[2, 3\] rows"),
        ({"kv": torch.ones(2, 4)}, "'kv'"),
        ({"fixed": torch.ones(1)}, "'fixed'"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    pool = make_pool()
    slot = pool.acquire()
    with pytest.raises(StateError, match=message):
        pool.load(slot, {**state_of([1.0, 2.0]), **change})
    assert pool.save(slot)["kv"].shape == (0, 3)


def test_is_finite_sees_the_rows_of_its_slot_only() -> None:
    pool = make_pool()
    first, second = pool.acquire(9), pool.acquire(9)
    write(pool, [first, second], [[float("inf")], [1.0]])
    assert not pool.is_finite(first)
    assert pool.is_finite(second)


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv_bytes is 100, less than one block of 16 tokens"):
        SlotPool(SPECS, 1, kv_bytes=100)
    with pytest.raises(ConfigError, match="one length"):
        SlotPool((*SPECS, TensorSpec("other", (3, 1), grows=True)), 1)
    pool = make_pool()
    with pytest.raises(NestedError, match="made for 20"):
        pool.extend([pool.acquire()], [MAX_STEP + 1])
