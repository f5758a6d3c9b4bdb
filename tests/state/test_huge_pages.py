"""Zeros in huge pages: what they hold, that they do not overlap, and that the pages really are huge."""

from __future__ import annotations

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

from nested_runtime.state.huge_pages import HUGE, zeros

CPU = torch.device("cpu")
SHAPES = {
    "odd": ((3, 5), torch.float64),
    "bytes": ((7,), torch.uint8),
    "none": ((0, 4), torch.float32),
    "floats": ((130, 129), torch.float32),
    "flags": ((2, 2), torch.bool),
}
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_tensors_are_zeros_of_their_shapes_and_do_not_overlap() -> None:
    tensors = zeros(SHAPES, CPU)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == SHAPES
    assert all(t.is_contiguous() and t.data_ptr() % 64 == 0 and not t.any() for t in tensors.values())
    for number, tensor in enumerate(tensors.values(), 1):
        tensor.fill_(number)
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        assert bool((tensor == (True if SHAPES[name][1] == torch.bool else number)).all()), name


def test_one_of_them_keeps_their_memory() -> None:
    tensors = zeros(SHAPES, CPU)
    kept = tensors.pop("floats").fill_(3)
    tensors.clear()
    gc.collect()
    zeros(SHAPES, CPU)["floats"].fill_(4)
    assert bool((kept == 3).all())


def test_nothing_can_be_asked_for() -> None:
    assert zeros({}, CPU) == {}


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not ENABLED.exists() or "[never]" in ENABLED.read_text(),
    reason="this system has no huge pages",
)
def test_the_pages_are_huge() -> None:
    tensor = zeros({"x": ((4 * HUGE,), torch.uint8)}, CPU)["x"].fill_(1)
    begin = tensor.data_ptr()
    assert begin % HUGE == 0
    huge, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(part, 16) for part in area.groups())
            inside = low < begin + len(tensor) and begin < high
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1]) * 1024
    assert huge >= HUGE, "memory may be short for some of them, but not for all"
