"""Freed memory goes back: the process shrinks by what lies between blocks still in use, and training sees to it."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from pathlib import Path

import pytest

from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.data import Corpus
from nested_runtime.train.heap import EVERY, trim
from nested_runtime.train.trainer import TrainConfig, Trainer

BLOCK, BLOCKS = 64 * 1024, 4000  # below the size that the allocator maps on its own; 256 MB
HOPE = {"vocab_size": 512, "dim": 32, "blocks": 1, "heads": 2, "head_dim": 16, "chunk": 16, "mlp_ratio": 2}
CONFIG = TrainConfig("hope", HOPE, lanes=4, length=32, warmup=2, bf16=False)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_holes_between_blocks_in_use_are_given_back() -> None:
    blocks: list[bytearray | None] = [bytearray(b"x" * BLOCK) for _ in range(BLOCKS)]
    for i in range(0, BLOCKS, 2):
        blocks[i] = None
    held = resident()
    assert trim()
    assert resident() < held - BLOCK * BLOCKS // 4
    assert all(block is None or block[-1] == ord("x") for block in blocks)


def test_a_run_gives_it_back_on_the_way(
    tmp_path: Path, corpus: Corpus, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[int] = []
    trainer = Trainer(replace(CONFIG, tokens=32 * 4 * (2 * EVERY + 1)), small_tokenizer, corpus, tmp_path, 0, 1)
    monkeypatch.setattr("nested_runtime.train.trainer.trim", lambda: given_back.append(trainer.step))
    assert len(list(trainer.run())) == 2 * EVERY + 1
    assert given_back == [EVERY, 2 * EVERY]
