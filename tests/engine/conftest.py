"""A small model family whose state mixes tokens, session position and a chunk clock, so wrong schedules show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from nested_runtime.core import Batch
from nested_runtime.models.base import LanguageModel, Pool
from nested_runtime.registry import FAMILIES
from nested_runtime.state.spec import TensorSpec


class GatedCounter(LanguageModel):
    """h <- g(x, position) h + x, copied to `anchor` at chunk ends; `window` holds the last two tokens' embeddings."""

    TINY: ClassVar[dict[str, Any]] = {}
    vocab_size = 40
    chunk = 4
    width = 8

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = nn.Parameter(torch.randn(self.vocab_size, self.width, generator=generator))
        self.gate = nn.Parameter(torch.randn(self.width, self.width, generator=generator) * 0.5)
        self.head = nn.Parameter(torch.randn(self.width, self.vocab_size, generator=generator))
        self.poison: int | None = None  # a token whose hidden state is NaN
        self.crash: int | None = None  # a token that makes forward raise
        self.num_read = 0

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> GatedCounter:
        return cls()

    def to_config(self) -> dict[str, Any]:
        return {}

    def state_spec(self) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("live", (self.width,)),
            TensorSpec("anchor", (self.width,)),
            TensorSpec("window", (2, self.width)),
            TensorSpec("count", (1,), torch.int64, "count"),
        )

    def step(self, token: int, position: int, state: dict[str, torch.Tensor]) -> torch.Tensor:
        x = self.embedding[token]
        gate = torch.sigmoid(x @ self.gate + position % 7 - 3)
        state["live"] = gate * state["live"] + x + 0.3 * state["window"].mean(0) + 0.1 * state["anchor"]
        state["window"] = torch.stack([state["window"][1], x])
        state["count"] = state["count"] + 1
        if (position + 1) % self.chunk == 0:
            state["anchor"] = state["live"].tanh()
        return state["live"].tanh() + 0.1 * state["anchor"]

    def forward(self, batch: Batch, pool: Pool) -> torch.Tensor:
        tokens = batch.token_ids.tolist()
        if self.crash in tokens:
            raise RuntimeError("the model failed")
        self.num_read += len(tokens)
        rows = []
        ends = batch.cu_seqlens.tolist()
        for b, (slot, position) in enumerate(zip(batch.slots.tolist(), batch.positions.tolist(), strict=True)):
            state = {name: tensor[slot].clone() for name, tensor in pool.items()}
            for offset, token in enumerate(tokens[ends[b] : ends[b + 1]]):
                hidden = self.step(token, position + offset, state)
                rows.append(hidden * float("nan") if token == self.poison else hidden)
            for name, tensor in pool.items():
                tensor[slot] = state[name]
        return torch.stack(rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ self.head).float()

    def scan(
        self, tokens: torch.Tensor, state: Mapping[str, torch.Tensor] | None, position: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        raise NotImplementedError


FAST = {"chunk": 4, "hidden": 6, "rate": 0.03, "optimizer": "momentum"}
SLOW = {"chunk": 8, "hidden": 6, "rate": 0.02}
LEVELED: dict[str, dict[str, Any]] = {
    "sequential": {"levels": [FAST, SLOW], "adaptive_blocks": 2},
    "nested": {"levels": [{**FAST, "rank": 2}, {**SLOW, "rank": 2}], "cms": "nested"},
    "deep": {"memory_hidden": 6, "momentum": True},
    "pieces": {"levels": [{**FAST, "chunk": 16}, {**SLOW, "chunk": 32, "rank": 2}]},
    "headwise": {"levels": [FAST, {**SLOW, "rank": 3}], "cms": "headwise"},
    "varied": {"changes": ["momentum", "adaptive-q"], "levels": [FAST]},
    "stacked": {
        "levels": [{**FAST, "hidden": None, "rank": 2}, {**SLOW, "hidden": None}],
        "cms": "stacked",
        "adaptive_blocks": 2,
    },
}


def _build(name: str, dtype: torch.dtype) -> LanguageModel:
    if name == "counter":
        return GatedCounter().to(dtype).eval()
    name, _, levels = name.partition("+")
    try:
        family = FAMILIES.get(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"family {name!r} is registered but not there yet: {error}")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        model = family.from_config({**family.TINY, **LEVELED.get(levels, {})})
        # Fresh output projections are zero: without noise a wrong state would go unseen.
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def build_model() -> Callable[[str, torch.dtype], LanguageModel]:
    """Builds a family's TINY model, as "family+variant" with levels, or "counter"; equal calls give equal models."""
    return _build


@pytest.fixture
def counter() -> LanguageModel:
    """A fresh float64 model, with switches for failures: `poison` and `crash`."""
    return _build("counter", torch.float64)
