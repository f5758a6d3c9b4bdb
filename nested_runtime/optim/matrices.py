"""Parameters seen as matrices, and Newton-Schulz orthogonalisation (NL Eq. 42-44), over a batch of sessions."""

from __future__ import annotations

import math

import torch

__all__ = ["as_matrix", "is_matrix", "newton_schulz", "shape_scale"]

QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's Muon: steepest slope at 0, singular values end in [0.7, 1.2]
NORM_EPS = 1e-7


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether one session's parameter has a matrix form (two axes or more)."""
    return len(shape) >= 2


def as_matrix(t: torch.Tensor) -> torch.Tensor:
    """[S, *shape] -> [S, rows, columns]: axis 1 against all the others; vectors and scalars are one row."""
    return t.flatten(2) if t.ndim > 2 else t.reshape(len(t), 1, -1)


def newton_schulz(m: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """m [S, rows, columns] -> its nearest (semi-)orthogonal matrix, roughly: singular values near 1, zero stays zero.

    X <- a X + (b A + c A^2) X with A = X X^T, from X = m / ||m||_F.
    """
    tall = m.shape[1] > m.shape[2]
    x = m.mT if tall else m
    x = x / (x.square().sum((1, 2), keepdim=True) + NORM_EPS**2).sqrt()
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def shape_scale(m: torch.Tensor) -> float:
    """sqrt(max(1, rows / columns)): keeps an orthogonal step's effect on activations alike for all shapes."""
    return math.sqrt(max(1.0, m.shape[1] / m.shape[2]))
