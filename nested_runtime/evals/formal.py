"""`nested-eval formal`: parity, (aa)* and a^n b^n (see `tasks.py`), small models trained on each; HOPE with C = 1."""

from __future__ import annotations

from nested_runtime.evals.synthetic import Study
from nested_runtime.evals.tasks import FORMAL

__all__ = ["STUDY"]

STUDY = Study(
    "train small models on parity, (aa)* and a^n b^n, judged on longer words too; HOPE with chunks of one token",
    FORMAL,
    {
        "hope, C=1": ("hope", {"chunk": 1}),
        "hope, C=8": ("hope", {"chunk": 8}),
        "titans": ("titans", {}),
        "delta": ("delta", {}),
        "transformer": ("transformer", {"window": 128}),
    },
    tokens=1_000_000,
    lanes=64,
)
