"""What every test starts with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """What a test draws with torch is the same whatever ran before it, on whatever worker.

    Fixtures of modules and sessions are made earlier: they seed themselves.
    """
    torch.manual_seed(0)
