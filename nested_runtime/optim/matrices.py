"""Parameters seen as matrices, and Newton-Schulz orthogonalisation (NL Eq. 42-44), over a batch of sessions."""

from __future__ import annotations

import math

import torch

__all__ = ["as_matrix", "is_matrix", "newton_schulz", "shape_scale"]

QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's Muon: steepest slope at 0, singular values end in [0.7, 1.2]
NORM_EPS = 1e-7
LONG = 2  # columns per row from which few products with all columns are worth more products without
RUN = 5  # iterations without them: rounding below an eigenvalue of 0 grows twelvefold in each


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether one session's parameter has a matrix form (two axes or more)."""
    return len(shape) >= 2


def as_matrix(t: torch.Tensor) -> torch.Tensor:
    """[S, *shape] -> [S, rows, columns]: axis 1 against all the others; vectors and scalars are one row."""
    return t.flatten(2) if t.ndim > 2 else t.reshape(len(t), 1, -1)


def newton_schulz(m: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """m [S, rows, columns] -> its nearest (semi-)orthogonal matrix, roughly: singular values near 1, zero stays zero.

    X <- B X with B = a + b A + c A^2, A = X X^T, from X = m / ||m||_F. All B are polynomials of the first A: where rows
    are long, A <- B A B goes on without them, and X is multiplied once, by the product of all B.
    """
    tall = m.shape[1] > m.shape[2]
    with torch.autocast(m.device.type, enabled=False):
        x = m.mT if tall else m
        x = x / (x.square().sum((1, 2), keepdim=True) + NORM_EPS**2).sqrt()
        if x.shape[2] > LONG * x.shape[1] and x.dtype in (torch.float32, torch.float64):
            for begin in range(0, steps, RUN):
                x = _by_gram(x, min(RUN, steps - begin))
        else:
            x = _by_rows(x, steps)
    return x.mT if tall else x


def _polynomial(gram: torch.Tensor) -> torch.Tensor:
    a, b, c = QUINTIC
    out = b * gram + c * gram @ gram
    out.diagonal(dim1=1, dim2=2).add_(a)
    return out


def _by_rows(x: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        x = _polynomial(x @ x.mT) @ x
    return x


def _by_gram(x: torch.Tensor, steps: int) -> torch.Tensor:
    gram = x @ x.mT
    factor = product = _polynomial(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = _polynomial(gram)
        product = factor @ product
    return product @ x


def shape_scale(m: torch.Tensor) -> float:
    """sqrt(max(1, rows / columns)): keeps an orthogonal step's effect on activations alike for all shapes."""
    return math.sqrt(max(1.0, m.shape[1] / m.shape[2]))
