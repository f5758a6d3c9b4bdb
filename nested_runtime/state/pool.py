"""SlotPool: the working copies of sessions, one fixed-size slot each."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nested_runtime.errors import ConfigError, NestedError, Overloaded, StateError
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
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise StateError(
                f"state tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {spec.dtype} {spec.shape}"
            )


class SlotPool:
    """`capacity` slots of session state plus slot 0, the padding, which stays zero.

    Every slot is in exactly one place: free (zero, nobody's), clean (acquired, still zero) or dirty (acquired and
    written). tensors: by TensorSpec name, each [capacity + 1, *shape].
    """

    def __init__(self, specs: tuple[TensorSpec, ...], capacity: int, device: torch.device | str = "cpu") -> None:
        if capacity < 1:
            raise ConfigError(f"capacity must be at least 1 slot, got {capacity}")
        if len({spec.name for spec in specs}) != len(specs):
            raise ConfigError(f"state tensor names are not unique: {sorted(spec.name for spec in specs)}")
        self.specs = specs
        self.capacity = capacity
        self.tensors = {
            spec.name: torch.zeros((capacity + 1, *spec.shape), dtype=spec.dtype, device=device) for spec in specs
        }
        self._free = list(range(capacity, 0, -1))
        self._clean: set[int] = set()
        self._dirty: set[int] = set()

    @property
    def num_free(self) -> int:
        """Slots that `acquire` can still hand out."""
        return len(self._free)

    def acquire(self) -> int:
        """Take a zeroed slot; Overloaded when none is free."""
        if not self._free:
            raise Overloaded(f"all {self.capacity} slots are in use; retry later or start with a larger capacity")
        slot = self._free.pop()
        self._clean.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Zero the slot and make it free. Zeroing happens here, so nothing of a tenant lies around."""
        self._require_owned(slot)
        if slot in self._dirty:
            for tensor in self.tensors.values():
                tensor[slot].zero_()
        self._clean.discard(slot)
        self._dirty.discard(slot)
        self._free.append(slot)

    def mark_dirty(self, slot: int) -> None:
        """Say that the slot is about to be written by other means than `load` and `copy` (a forward pass)."""
        if slot not in self._dirty:
            self._require_owned(slot)
            self._clean.remove(slot)
            self._dirty.add(slot)

    def load(self, slot: int, state: Mapping[str, torch.Tensor]) -> None:
        """Copy `state` (tensors by name, without slot axis) into the slot; StateError if it does not fit."""
        check_state(self.specs, state)
        self.mark_dirty(slot)
        for name, tensor in self.tensors.items():
            tensor[slot].copy_(state[name])

    def save(self, slot: int) -> dict[str, torch.Tensor]:
        """The slot's state as CPU tensors of its own, in spec order."""
        self._require_owned(slot)
        return {name: tensor[slot].to("cpu", copy=True) for name, tensor in self.tensors.items()}

    def copy(self, src: int, dst: int) -> None:
        """Make the state of acquired slot `dst` equal to that of `src`."""
        self._require_owned(src)
        self.mark_dirty(dst)
        for tensor in self.tensors.values():
            tensor[dst].copy_(tensor[src])

    def is_finite(self, slot: int) -> bool:
        """Whether no tensor of the slot holds NaN or infinity."""
        # The sum is finite whenever all terms are, unless it overflows: only then look at every element.
        rows = [tensor[slot] for tensor in self.tensors.values() if tensor.is_floating_point()]
        return all(bool(row.sum().isfinite()) or bool(row.isfinite().all()) for row in rows)

    def check_integrity(self, *, deep: bool = False) -> None:
        """Raise NestedError unless free + clean + dirty is every slot once; deep: and slots not dirty are all zero."""
        places = [*self._free, *self._clean, *self._dirty]
        if sorted(places) != list(range(1, self.capacity + 1)):
            raise NestedError(
                f"slot accounting is broken: free {sorted(self._free)} + clean {sorted(self._clean)} + dirty "
                f"{sorted(self._dirty)} is not slots 1..{self.capacity} once each; restart the engine"
            )
        if not deep:
            return
        for slot in (0, *self._free, *self._clean):
            for name, tensor in self.tensors.items():
                if bool(tensor[slot].any()):
                    raise NestedError(f"slot {slot} should be zero but tensor {name!r} is not; restart the engine")

    def _require_owned(self, slot: int) -> None:
        if slot not in self._clean and slot not in self._dirty:
            raise NestedError(f"slot {slot} is not acquired; acquired are {sorted(self._clean | self._dirty)}")
