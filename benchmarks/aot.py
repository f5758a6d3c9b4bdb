"""Ahead-of-time gate of the Triton kernels: they compile for every target, spill nothing and fit in shared memory.

    python -m benchmarks.aot [--targets sm_90 ...] [--kernels decode ...]

Needs no GPU: Triton's wheel carries ptxas and cuobjdump. What is compiled is what `benchmarks/specimens.py` launches:
launches are recorded instead of run, so nothing here repeats a signature. Compiled kernels are kept by the hash of
their source in build/aot. Exits 1 and names the kernel where one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "aot"))
if os.environ.pop("TRITON_INTERPRET", None):
    print("TRITON_INTERPRET is ignored: nothing is interpreted here")

import torch  # noqa: E402 - Triton reads the environment when imported
import triton  # noqa: E402 - as above
from triton.backends.compiler import GPUTarget  # noqa: E402 - as above
from triton.compiler import ASTSource  # noqa: E402 - as above
from triton.runtime.jit import JITFunction  # noqa: E402 - as above

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}
NVIDIA = ("sm_80", "sm_90", "sm_100")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Launch(NamedTuple):
    """One kernel as it is launched: arguments by name, compiler options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    def source(self, target: str) -> ASTSource:
        """What Triton would compile for these arguments."""
        signature, constants, attributes = {}, {}, {}
        for index, (name, parameter) in enumerate(zip(self.kernel.arg_names, self.kernel.params, strict=True)):
            value = self.arguments.get(name, parameter.default)
            if target == "gfx942" and name == "PREC":
                value = "ieee"
            aligned = True
            if isinstance(value, torch.Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
            elif parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            elif isinstance(value, float):
                signature[name], aligned = "fp32", False
            else:
                signature[name], aligned = ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


class Result(NamedTuple):
    """What one kernel needs on one target; `error` is empty where it passes."""

    name: str
    target: str
    seconds: float
    registers: int = 0
    stack: int = 0
    shared: int = 0
    error: str = ""


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside are recorded instead of run."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del grid, warmup
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        launches.append(Launch(self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


def launches_of(name: str) -> list[Launch]:
    from benchmarks.specimens import SPECIMENS

    with recorded() as launches:
        SPECIMENS[name]()
    return launches


def build(name: str, target: str) -> list[Result]:
    """Compile what specimen `name` launches."""
    results = []
    for launch in launches_of(name):
        began, label = time.perf_counter(), f"{name}: {launch.kernel.__name__}"
        try:
            compiled = triton.compile(launch.source(target), target=TARGETS[target][0], options=launch.options)
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the finding
            results.append(
                Result(label, target, time.perf_counter() - began, error=f"does not compile: {error!r}"[:800])
            )
            continue
        usage = resources(compiled) if target in NVIDIA else (0, 0)
        shared = compiled.metadata.shared
        found = Result(label, target, time.perf_counter() - began, *usage, shared)
        results.append(found._replace(error=verdict(found)))
    return results


def verdict(found: Result) -> str:
    limit = TARGETS[found.target][1]
    if found.shared > limit:
        return f"needs {found.shared} bytes of shared memory, over {limit}"
    return f"spills {found.stack} bytes a thread" if found.stack else ""


def resources(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of stack and local memory (spills) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def main() -> None:
    from benchmarks.specimens import SPECIMENS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=NVIDIA)
    parser.add_argument("--kernels", nargs="+", choices=SPECIMENS, default=list(SPECIMENS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args()
    began, rows, failed = time.perf_counter(), [], 0
    print(f"{'kernel':44}{'target':>8}{'registers':>11}{'spills':>8}{'shared':>9}{'seconds':>9}")
    with ProcessPoolExecutor(args.jobs) as pool:
        for results in pool.map(build, *zip(*[(n, t) for n in args.kernels for t in args.targets], strict=True)):
            for r in results:
                print(
                    f"{r.name:44}{r.target:>8}{r.registers:11}{r.stack:8}{r.shared:9}{r.seconds:9.1f}  {r.error}",
                    flush=True,
                )
                rows.append(r._asdict())
                failed += bool(r.error)
    output = ROOT / "build" / "bench" / "aot.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} kernels, {failed} fail, {time.perf_counter() - began:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
