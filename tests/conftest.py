"""What every test starts with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Weights and inputs drawn in a test are the same whatever ran before it, on whatever worker."""
    torch.manual_seed(0)
