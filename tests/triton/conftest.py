"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter on CPU tensors.

The interpreter must be chosen before a kernel is imported, so this file does it; nothing else in the tree reads it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Every torch.empty is full of NaN: what a kernel leaves unwritten shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def normal(device: torch.device) -> Callable[..., torch.Tensor]:
    """Standard normal float32 numbers of a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


@pytest.fixture
def relative() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Largest difference in units of the largest expected number."""

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        expected = expected.double().cpu()
        return float((found.double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-2))

    return error
