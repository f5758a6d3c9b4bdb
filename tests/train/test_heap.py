"""Freed memory goes back: the process shrinks by what lies between blocks still in use."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from nested_runtime.train.heap import trim

BLOCK, BLOCKS = 64 * 1024, 4000  # below the size that the allocator maps on its own; 256 MB


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_holes_between_blocks_in_use_are_given_back() -> None:
    blocks: list[bytearray | None] = [bytearray(b"x" * BLOCK) for _ in range(BLOCKS)]
    for i in range(0, BLOCKS, 2):
        blocks[i] = None
    held = resident()
    assert trim()
    assert resident() < held - BLOCK * BLOCKS // 4
    assert all(block is None or block[-1] == ord("x") for block in blocks)
