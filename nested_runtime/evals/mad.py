"""`nested-eval mad`: recall, selective copy and compression (see `tasks.py`), small models trained on each."""

from __future__ import annotations

from nested_runtime.evals.synthetic import Study
from nested_runtime.evals.tasks import MAD

__all__ = ["STUDY"]

STUDY = Study(
    "train small models on in-context recall, selective copy and compression",
    MAD,
    {
        "hope": ("hope", {"chunk": 16}),
        "titans": ("titans", {}),
        "delta": ("delta", {}),
        "transformer": ("transformer", {"window": 64}),
    },
    tokens=200_000,
    lanes=16,
)
