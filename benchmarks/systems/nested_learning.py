"""`nested-learning` from PyPI: the published replication of HOPE, its self-modifying memories updating as they read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nested_learning.levels import LevelSpec
from nested_learning.model import HOPEModel, ModelConfig

from benchmarks.systems.base import BLOCKS, DIM, HEADS, VOCAB, Case, tokens

__all__ = ["NestedLearning"]

CONTEXT = 8  # its state has a fixed size: what it has read before costs nothing


class NestedLearning:
    """See `System`. Chunks of 8 and 64 as in its paper-faithful configuration; its CMS takes no steps here."""

    name = "nested-learning"

    def __init__(self) -> None:
        never = LevelSpec("static", 1 << 30)
        config = ModelConfig(
            vocab_size=VOCAB, dim=DIM, num_layers=BLOCKS, heads=HEADS, titan_level=never, cms_levels=[never],
            block_variant="hope_selfmod", self_mod_chunk_size=8, self_mod_chunk_size_memory=64, qk_l2_norm=True,
        )  # fmt: skip
        self._model = HOPEModel(config).eval()
        self.num_parameters = sum(p.numel() for p in self._model.parameters())

    def prepare(self, case: Case) -> Callable[[], None] | None:
        """See `System`."""
        if case.context > 512:
            return None
        if not case.context:
            prompt = tokens(1, case.num_tokens)
            return lambda: self._read(prompt, self._model.init_fast_state())
        state = self._model.init_fast_state()
        last = self._read(tokens(case.sessions, CONTEXT), state)

        def decode() -> None:
            nonlocal last
            last = self._read(last, state)

        return decode

    def _read(self, ids, state):  # type: ignore[no-untyped-def]  # another library's
        # A teach signal turns the self-modifying updates on; zeros leave its CMS alone.
        silent = torch.zeros(*ids.shape, DIM)
        logits = self._model(ids, teach_signal=silent, fast_state=state, finalize_updates=False)
        return logits[:, -1].argmax(-1, keepdim=True)
