"""The ahead-of-time gate itself: it knows every kernel, and says so when one spills or needs too much shared memory.

`make aot` compiles them all for every target; here one small family is, in a process that interprets nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


SCRIPT = """
import sys
import benchmarks.aot as aot
from benchmarks.specimens import SPECIMENS
print(sorted({launch.kernel.__name__ for name in SPECIMENS for launch in aot.launches_of(name)}))
result = aot.Result("k", "sm_80", 1.0, 255, 0, 166_912)
assert aot.verdict(result) == ""
assert "over 166912" in aot.verdict(result._replace(shared=166_913))
assert aot.verdict(result._replace(stack=8)) == "spills 8 bytes a thread"
sys.argv = ["aot", "--kernels", "slots", "--targets", "sm_90", "--jobs", "1"]
aot.main()
"""


@pytest.fixture(scope="module")
def report() -> str:
    """What the script prints; one process for both tests, most of whose time are imports."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_a_family_compiles_without_spills(report: str) -> None:
    assert "2 kernels, 0 fail" in report


def test_the_gate_compiles_every_kernel_that_is_launched(report: str) -> None:
    covered = set(re.findall(r"'(\w+)'", report))
    sources = (ROOT / "nested_runtime" / "kernels").rglob("triton*.py")
    launched = {name for path in sources for name in re.findall(r"^ +(\w+)\[[^]\n]+\]\(", path.read_text(), re.M)}
    assert len(launched) >= 15
    assert launched == covered
