"""Row layout and options of the stacked state: five memories of one head on one value axis."""

from __future__ import annotations

from dataclasses import dataclass

from nested_runtime.errors import ConfigError

__all__ = ["ETA_MAX", "NORM_EPS", "RuleOptions", "rows"]

NORM_EPS = 1e-6  # added to the squared norm of keys and queries
ETA_MAX = 0.5  # eta <= alpha / 2 keeps alpha - 2 eta a contraction (MODEL.md section 2)


@dataclass(frozen=True)
class RuleOptions:
    """Choices the paper leaves open (MODEL.md section 6).

    chunk   C, tokens per anchor, counted in session tokens
    read    "token": o_t = M_mem,t(q_t); "anchor": o_t = M_mem,a(q_t), NL Eq. 90 to the letter
    retain  what decay pulls towards: "start" = the learned initial memories, "zero" = NL Eq. 88 to the letter
    """

    chunk: int = 32
    read: str = "token"
    retain: str = "start"

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ConfigError(f"chunk must be at least 1, got {self.chunk}")
        if self.read not in ("token", "anchor"):
            raise ConfigError(f'read must be "token" or "anchor", got {self.read!r}')
        if self.retain not in ("start", "zero"):
            raise ConfigError(f'retain must be "start" or "zero", got {self.retain!r}')


def rows(dim: int) -> dict[str, slice]:
    """Rows of the stacked state [R, K] per memory, R = 3 K + 2. k, eta and alpha are adjacent: x^k reads all three."""
    return {
        "k": slice(0, dim),
        "eta": slice(dim, dim + 1),
        "alpha": slice(dim + 1, dim + 2),
        "v": slice(dim + 2, 2 * dim + 2),
        "mem": slice(2 * dim + 2, 3 * dim + 2),
    }
