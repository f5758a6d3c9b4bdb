"""`titans-pytorch` from PyPI: memory as context, its neural memory learning as it reads, with its own caches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from titans_pytorch import MemoryAsContextTransformer

from benchmarks.systems.base import BLOCKS, DIM, HEADS, VOCAB, Case, tokens

__all__ = ["TitansPytorch"]

SEGMENT = 128
CONTEXT = SEGMENT + SEGMENT // 4  # attention ends at the segment and the memory has a fixed size
ROOM = 256


class TitansPytorch:
    """See `System`. Its README's configuration at our width, with an MLP twice as wide as the stream."""

    name = "titans-pytorch"

    def __init__(self) -> None:
        self._model = MemoryAsContextTransformer(
            num_tokens=VOCAB, dim=DIM, depth=BLOCKS, heads=HEADS, segment_len=SEGMENT, ff_mult=2,
            num_persist_mem_tokens=4, num_longterm_mem_tokens=16,
        ).eval()  # fmt: skip
        self.num_parameters = sum(p.numel() for p in self._model.parameters())

    def prepare(self, case: Case) -> Callable[[], None] | None:
        """See `System`. A decode step includes the memory tokens that fall between two segments."""
        if case.context > 512:
            return None
        if not case.context:
            prompt = tokens(1, case.num_tokens)
            return lambda: self._read(prompt, None, None)[0].argmax(-1, keepdim=True)
        model = self._model
        read = tokens(case.sessions, CONTEXT)
        sides = model.axial_pos_emb.maybe_derive_outer_dim(
            model.seq_len_with_longterm_mem(CONTEXT + ROOM), (model.neural_memory_segment_len,)
        )
        places = model.axial_pos_emb(sides, return_factorized=True)
        logits, cache = self._read(read, None, None)
        read = torch.cat((read, logits.argmax(-1, keepdim=True)), dim=1)

        def decode() -> None:
            nonlocal read, cache
            logits = None
            while logits is None:
                logits, cache = self._read(read, cache, places)
            read = torch.cat((read, logits.argmax(-1, keepdim=True)), dim=1)

        return decode

    def _read(self, ids, cache, places):  # type: ignore[no-untyped-def]  # another library's
        logits, cache = self._model(
            ids, disable_flex_attn=True, cache=cache, return_cache=True, factorized_pos_emb=places
        )
        return (None if logits is None else logits[:, -1]), cache
