"""A tiny random HOPE model on disk, loaded for the in-process path and served by a real nested-serve process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from nested_runtime.models.loading import LoadedModel, build, load, save_model
from nested_runtime.registry import FAMILIES
from nested_runtime.tokenizer import SPECIAL, Tokenizer

ROOT = Path(__file__).resolve().parents[2]


def write_model(folder: Path, family: str, noise: float = 0.5) -> Path:
    """A random model over bytes whose greedy text is letters and differs from prompt to prompt."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Backend(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(1)
    model = build(family, {**FAMILIES.get(family).TINY, "vocab_size": len(vocab)})
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * noise)
        letters = [vocab[letter] for letter in "abcdefghijklmnopqrstuvwxyz ,." if letter in vocab]
        model.embed[letters] *= 20
    save_model(folder, family, model, Tokenizer(backend), f"tiny-{family}", torch.float32)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("evals") / "tiny", "hope")


@pytest.fixture(scope="session")
def calm_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """HOPE and the control with weights small enough for streams of thousands of tokens."""
    base = tmp_path_factory.mktemp("calm")
    return write_model(base / "hope", "hope", 0.1), write_model(base / "control", "transformer", 0.1)


@pytest.fixture(scope="session")
def loaded(folder: Path) -> LoadedModel:
    return load(str(folder))


@pytest.fixture(scope="session")
def server_url(folder: Path) -> Iterator[str]:
    """The base URL of a real server of the tiny model."""
    pytest.importorskip("server.app", reason="the server cannot be imported yet")
    command = [sys.executable, "-m", "server", "--port", "0", "--threads", "1", "--store", "memory:"]
    process = subprocess.Popen(
        [*command, "--model", str(folder)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if " on http" in line:
            break
    try:
        assert said, "the server said nothing"
        assert " on http" in said[-1], "".join(said)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield said[-1].split(" on ")[1].split(",")[0]
    finally:
        process.kill()
        process.wait(30)
        process.stderr.close()
