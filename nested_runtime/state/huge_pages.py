"""Host memory in huge pages, for what every step reads from end to end.

A decode step walks through the memories of all its sessions: in pages of 4 KiB that is thousands of address
translations, 3 to 6 % of a step of 16 sessions on a virtual machine (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping
from math import prod

import torch

__all__ = ["HUGE", "zeros"]

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

HUGE = 1 << 21  # bytes of a huge page on x86 and on most of ARM
ALIGN = 64  # bytes between which tensors begin: a line of the caches


def zeros(shapes: Shapes, device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of zeros by name, from shape and dtype; on a CPU side by side in one mapping, which lives as long as any.

    Pages are taken when they are first touched, as by `torch.zeros`; where the system has no huge pages they are small.
    """
    if device.type != "cpu":
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
    sizes = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    rooms = {name: -(-size // ALIGN) * ALIGN for name, size in sizes.items()}
    memory = _mapping(sum(rooms.values()))
    out, begin = {}, 0
    for name, (shape, dtype) in shapes.items():
        out[name] = memory[begin : begin + sizes[name]].view(dtype).view(shape)
        begin += rooms[name]
    return out


def _mapping(size: int) -> torch.Tensor:
    """Bytes [size] that begin with a huge page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    mapped = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    begin = -memory.data_ptr() % HUGE
    return memory[begin : begin + size]
