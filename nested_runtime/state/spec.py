"""What a session is, as tensors: a flat tuple of named, fixed shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["TensorSpec", "prefixed", "total_bytes"]


@dataclass(frozen=True)
class TensorSpec:
    """One state tensor of one session. **All zeros is the fresh state**, for every rule and family.

    name   dotted path, unique in a model ("blocks.3.memory.anchor")
    shape  per session, without the slot axis
    dtype  float32 for memories (MODEL.md decision 4)
    level  the level it belongs to ("fast", "cms.1", "kv"): what reset and the inspector select by
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    level: str = "fast"

    @property
    def num_bytes(self) -> int:
        """Bytes of one session's tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def prefixed(prefix: str, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The same specs with `prefix.` before every name."""
    return tuple(TensorSpec(f"{prefix}.{s.name}", s.shape, s.dtype, s.level) for s in specs)


def total_bytes(specs: tuple[TensorSpec, ...]) -> int:
    """Bytes of one session's whole live state."""
    return sum(s.num_bytes for s in specs)
