"""What a session is, as tensors: named tensors of fixed shapes, and some that grow by a row per token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

__all__ = ["TensorSpec", "newest_rows", "prefixed", "total_bytes"]


@dataclass(frozen=True)
class TensorSpec:
    """One state tensor of one session. **All zeros is the fresh state**, for every rule and family.

    name   dotted path, unique in a model ("blocks.3.memory.anchor")
    shape  per session, without the slot axis
    dtype  float32 for memories (MODEL.md decision 4)
    level  the level it belongs to ("fast", "cms.1", "kv"): what reset and the inspector select by
    grows  the first axis counts tokens: a state holds the newest r <= shape[0] rows, 0 when fresh. All growing tensors
           of a model are of one level and have the same r
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    level: str = "fast"
    grows: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of one session's tensor, at its longest if it grows."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def fresh_shape(self) -> tuple[int, ...]:
        """Shape of the fresh state."""
        return (0, *self.shape[1:]) if self.grows else self.shape


def prefixed(prefix: str, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The same specs with `prefix.` before every name."""
    return tuple(replace(spec, name=f"{prefix}.{spec.name}") for spec in specs)


def newest_rows(
    specs: tuple[TensorSpec, ...], state: Mapping[str, torch.Tensor], max_bytes: int
) -> Mapping[str, torch.Tensor]:
    """The state with what grows cut to its newest rows, as many as `max_bytes` hold."""
    growing = [spec for spec in specs if spec.grows]
    row_bytes = sum(spec.num_bytes // spec.shape[0] for spec in growing)
    if not growing or len(state[growing[0].name]) * row_bytes <= max_bytes:
        return state
    rows = max_bytes // row_bytes
    cut = {s.name: state[s.name][len(state[s.name]) - rows :].clone() for s in growing}
    return {name: cut.get(name, tensor) for name, tensor in state.items()}


def total_bytes(specs: tuple[TensorSpec, ...]) -> int:
    """Bytes of one session's whole live state."""
    return sum(s.num_bytes for s in specs)
