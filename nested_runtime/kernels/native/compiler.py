"""Builds the C++ kernels with the machine's own g++ at their first use and keeps the library in the user's cache.

The file name is a digest of every source, the flags, the compiler and the processor: a change of any of them builds
anew, and a cache that travels to another machine is not used there. Where nothing can be built ImportError says why.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["library"]

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-pthread",
    "-Wno-psabi",
)
SECONDS = 300


@cache
def library(source: str, scalar: str) -> ctypes.CDLL:
    """`source`.cpp built for memories of `scalar`, "float" or "double"; ImportError where it cannot be built."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise ImportError("there is no g++ to build the C++ kernels with; install it, or use NESTED_KERNELS=numba")
    try:
        name = f"{source}-{scalar}-{_digest(compiler)}.so"
        folder = _folder()
        path = folder / name
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _build(compiler, source, scalar, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise ImportError(f"the C++ kernels cannot be built, kept or loaded: {error}") from error


def _sources() -> list[Path]:
    return sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")])


def _digest(compiler: str) -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in _sources():
        digest.update(source.read_bytes())
    version = subprocess.run(  # noqa: S603 - the compiler of this machine
        [compiler, "--version"], capture_output=True, check=False, timeout=SECONDS
    )
    digest.update(version.stdout + _processor().encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + "".join(line for line in lines if line.startswith(("flags", "Features"))).strip()


def _folder() -> Path:
    """A directory that is ours alone: nobody else may put a library there."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "nested-runtime"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"nested-runtime-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} may be written by others; remove it or set XDG_CACHE_HOME")
    return folder


def _build(compiler: str, source: str, scalar: str, path: Path) -> None:
    """Compile beside the target and move it there, so that nobody ever loads half a file."""
    part = path.with_suffix(".part")
    command = [compiler, *FLAGS, f"-DSCALAR={scalar}", str(HERE / f"{source}.cpp"), "-o", str(part)]
    done = subprocess.run(  # noqa: S603 - our own source, found beside this file
        command, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    if done.returncode:
        raise ImportError(f"{compiler} cannot build the C++ kernels: {done.stderr[-2000:]}")
    part.replace(path)
