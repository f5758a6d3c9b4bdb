"""Freed memory goes back to the system.

The backward pass frees on its own thread what the forward pass allocated, in sizes that change with every batch. glibc
keeps such holes for later requests that do not fit them: with segments of 1,024 tokens a process had grown to 12 GB
after 400 steps, where 2 GB are in use (docs/log.md).
"""

from __future__ import annotations

import ctypes

__all__ = ["EVERY", "trim"]

EVERY = 10  # steps between trims


def trim() -> bool:
    """Return what the allocator holds and nobody uses; whether there was any. Only glibc has `malloc_trim`."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return release is not None and bool(release(0))
