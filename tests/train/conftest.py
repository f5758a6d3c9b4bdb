"""A corpus small enough to train on in seconds, written to a folder as `--data` names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.data import Corpus, texts
from nested_runtime.train.vocabulary import train_tokenizer


def _chat(i: int) -> dict[str, object]:
    pairs = [(f"How was day {i}?", "It was fine, thanks."), ("And the weather?", f"Sunny, {i} degrees.")]
    messages = [{"role": r, "content": c} for pair in pairs for r, c in zip(("user", "assistant"), pair, strict=True)]
    return {"messages": messages}


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose as zstd and chats as plain JSONL; a share-alike file that must be left out."""
    folder = tmp_path_factory.mktemp("data")
    prose = "".join(json.dumps({"text": f"The cat number {i} sat on the mat and slept."}) + "\n" for i in range(250))
    (folder / "pretrain_1_tiny.jsonl.zst").write_bytes(zstandard.compress(prose.encode()))
    (folder / "chat_1_tiny.jsonl").write_text("".join(json.dumps(_chat(i)) + "\n" for i in range(250)))
    (folder / "chat_1_alike.CC-BY-SA.jsonl").write_text(json.dumps({"text": "Forbidden."}) + "\n")
    (folder / "README.md").write_text("not data")
    return folder


@pytest.fixture(scope="session")
def small_tokenizer(data_folder: Path) -> Tokenizer:
    """512 entries."""
    return train_tokenizer(texts(data_folder), 512, dialogues=150)


@pytest.fixture(scope="session")
def corpus(data_folder: Path, small_tokenizer: Tokenizer) -> Corpus:
    """The tokenised folder."""
    return Corpus(data_folder, small_tokenizer)
