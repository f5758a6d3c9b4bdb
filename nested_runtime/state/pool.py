"""SlotPool: the working copies of sessions: one fixed-size slot each, and blocks for what grows (state/blocks.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch

from nested_runtime.core import KVRows
from nested_runtime.errors import ConfigError, NestedError, Overloaded, StateError
from nested_runtime.state.blocks import BlockPool
from nested_runtime.state.huge_pages import zeros
from nested_runtime.state.spec import TensorSpec

__all__ = ["SlotPool", "check_state"]


def check_state(specs: tuple[TensorSpec, ...], state: Mapping[str, torch.Tensor]) -> None:
    """Raise StateError unless `state` has exactly the tensors, shapes and dtypes of `specs`."""
    expected = {spec.name: spec for spec in specs}
    if state.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        raise StateError(f"state does not fit the model: missing {missing}, unknown {extra}; load one of this model")
    for name, spec in expected.items():
        tensor = state[name]
        if not _fits(tensor, spec):
            raise StateError(
                f"state tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {spec.dtype} {spec.shape}"
                f"{' or fewer rows' if spec.grows else ''}"
            )
    rows = {len(state[spec.name]) for spec in specs if spec.grows}
    if len(rows) > 1:
        raise StateError(f"state tensors that grow together have {sorted(rows)} rows; they must have the same number")


def _fits(tensor: torch.Tensor, spec: TensorSpec) -> bool:
    if tensor.dtype != spec.dtype or tensor.dim() != len(spec.shape):
        return False
    shape = tuple(tensor.shape)
    return shape[1:] == spec.shape[1:] and shape[0] <= spec.shape[0] if spec.grows else shape == spec.shape


class SlotPool:
    """`capacity` slots of session state plus slot 0, the padding, which stays zero.

    Every slot is in exactly one place: free (zero, nobody's), clean (acquired, still zero) or dirty (acquired and
    written). tensors: by TensorSpec name, each [capacity + 1, *shape], and those of `blocks`, which holds the tensors
    that grow (None where none does). kv_bytes, max_step: see BlockPool.
    """

    def __init__(
        self,
        specs: tuple[TensorSpec, ...],
        capacity: int,
        device: torch.device | str = "cpu",
        *,
        kv_bytes: int | None = None,
        max_step: int = 512,
    ) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity must be at least 1 slot, got {capacity}")
        if len({spec.name for spec in specs}) != len(specs):
            raise ConfigError(f"state tensor names are not unique: {sorted(spec.name for spec in specs)}")
        self.specs = specs
        self.capacity = capacity
        self.device = torch.device(device)
        self._slots = zeros({s.name: ((capacity + 1, *s.shape), s.dtype) for s in specs if not s.grows}, self.device)
        growing = [spec for spec in specs if spec.grows]
        self.blocks = BlockPool(growing, capacity, kv_bytes, max_step, device) if growing else None
        self.tensors = {**self._slots, **(self.blocks.tensors if self.blocks else {})}
        self._free = list(range(capacity, 0, -1))
        self._clean: set[int] = set()
        self._dirty: set[int] = set()

    @property
    def num_free(self) -> int:
        """Slots that `acquire` can still hand out."""
        return len(self._free)

    def has_room(self, rows: int | None = None) -> bool:
        """Whether `acquire(rows)` would work."""
        return bool(self._free) and (self.blocks is None or self.blocks.needed(rows) <= self.blocks.num_free)

    def can_ever_hold(self, rows: int) -> bool:
        """Whether `acquire(rows)` would work on an empty pool."""
        return self.blocks is None or self.blocks.needed(rows) <= self.blocks.num_blocks

    def acquire(self, rows: int | None = None) -> int:
        """Take a zeroed slot that may come to `rows` rows of what grows (None = the most); Overloaded when none is."""
        if not self._free:
            raise Overloaded(f"all {self.capacity} slots are in use; retry later or start with a larger capacity")
        if self.blocks is not None:
            self.blocks.acquire(self._free[-1], rows)
        slot = self._free.pop()
        self._clean.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Zero the slot and make it free. Zeroing happens here, so nothing of a tenant lies around."""
        self._require_owned(slot)
        if slot in self._dirty and self._slots:
            torch._foreach_zero_(self._rows(slot))
        if self.blocks is not None:
            self.blocks.release(slot)
        self._clean.discard(slot)
        self._dirty.discard(slot)
        self._free.append(slot)

    def mark_dirty(self, slot: int) -> None:
        """Say that the slot is about to be written by other means than `load` and `copy` (a forward pass)."""
        if slot not in self._dirty:
            self._require_owned(slot)
            self._clean.remove(slot)
            self._dirty.add(slot)

    def extend(self, slots: Sequence[int], counts: Sequence[int]) -> KVRows | None:
        """Say that each slot is about to read `counts` tokens; where its rows lie (None where nothing grows)."""
        for slot in slots:
            if slot:
                self.mark_dirty(slot)
        return self.blocks.extend(slots, counts) if self.blocks is not None else None

    def load(self, slot: int, state: Mapping[str, torch.Tensor]) -> None:
        """Copy `state` (tensors by name, without slot axis) into the slot; StateError if it does not fit."""
        check_state(self.specs, state)
        self.mark_dirty(slot)
        for name, tensor in self._slots.items():
            tensor[slot].copy_(state[name])
        if self.blocks is not None:
            self.blocks.load(slot, state)

    def save(self, slot: int) -> dict[str, torch.Tensor]:
        """The slot's state as CPU tensors of its own, in spec order."""
        state = self._view(slot)
        return {name: state[name].to("cpu", copy=name in self._slots) for name in (spec.name for spec in self.specs)}

    def _view(self, slot: int) -> dict[str, torch.Tensor]:
        """The slot's state on the pool's device; rows of what grows are a copy."""
        self._require_owned(slot)
        rows = self.blocks.save(slot) if self.blocks is not None else {}
        return {name: tensor[slot] for name, tensor in self._slots.items()} | rows

    def _rows(self, slot: int) -> list[torch.Tensor]:
        """The slot of every tensor that does not grow, for operations that a GPU does in one launch."""
        return [tensor[slot] for tensor in self._slots.values()]

    def copy(self, src: int, dst: int) -> None:
        """Make the state of acquired slot `dst` equal to that of `src`."""
        state = self._view(src)
        self.mark_dirty(dst)
        if self._slots:
            torch._foreach_copy_(self._rows(dst), self._rows(src))
        if self.blocks is not None:
            self.blocks.load(dst, state)

    def is_finite(self, slot: int) -> bool:
        """Whether no tensor of the slot holds NaN or infinity."""
        # The sum is finite whenever all terms are, unless it overflows: only then look at every element.
        rows = [tensor for tensor in self._view(slot).values() if tensor.is_floating_point()]
        return all(isfinite(row.sum().item()) or bool(row.isfinite().all()) for row in rows)

    def check_integrity(self, *, deep: bool = False) -> None:
        """Raise NestedError unless free + clean + dirty is every slot once; deep: and slots not dirty are all zero."""
        places = [*self._free, *self._clean, *self._dirty]
        if sorted(places) != list(range(1, self.capacity + 1)):
            raise NestedError(
                f"slot accounting is broken: free {sorted(self._free)} + clean {sorted(self._clean)} + dirty "
                f"{sorted(self._dirty)} is not slots 1..{self.capacity} once each; restart the engine"
            )
        if self.blocks is not None:
            self.blocks.check_integrity(deep=deep)
        if not deep:
            return
        for slot in (0, *self._free, *self._clean):
            for name, tensor in self._slots.items():
                if bool(tensor[slot].any()):
                    raise NestedError(f"slot {slot} should be zero but tensor {name!r} is not; restart the engine")

    def _require_owned(self, slot: int) -> None:
        if slot not in self._clean and slot not in self._dirty:
            raise NestedError(f"slot {slot} is not acquired; acquired are {sorted(self._clean | self._dirty)}")
