"""How the CPU kernels are compiled: numba, machine code kept between server starts, no interpreter lock held."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

__all__ = ["entry", "inner"]

Function = TypeVar("Function", bound=Callable[..., Any])
OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz"},  # sums in vector lanes; not nnan and ninf: a NaN must stay one
    "nogil": True,
    "error_model": "numpy",
}


@cache
def sources(folder: Path = Path(__file__).parent) -> str:
    """Digest of every kernel's source below `folder`: what the machine code in the cache belongs to."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def entry(function: Function) -> Function:
    """Compile a kernel that Python calls, at its first call, one version per argument types.

    Machine code is cached beside the source, or in the user's cache directory where that is read-only
    (`NUMBA_CACHE_DIR` overrides both), or not at all where neither can be written.
    """
    try:
        compiled = njit(cache=True, **OPTIONS)(function)
        # numba looks at the entry's own file; a change in a helper's file must compile anew, too.
        compiled._cache._cache_file._source_stamp = sources()
        return compiled  # type: ignore[no-any-return]
    except RuntimeError:  # numba: "cannot cache function ...: no locator available for file"
        return njit(**OPTIONS)(function)  # type: ignore[no-any-return]


def inner(function: Function) -> Function:
    """Compile a function that only compiled code calls; it is part of its caller's machine code."""
    internal: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # half the code to compile
    return njit(**internal, **OPTIONS)(function)  # type: ignore[no-any-return]
