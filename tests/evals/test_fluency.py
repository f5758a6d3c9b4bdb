"""Perplexity: the state is carried, streams are cut right, and held-out text alone is measured."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from nested_runtime.evals.cli import main
from nested_runtime.evals.fluency import LENGTH, streams, token_losses
from nested_runtime.models.loading import LoadedModel
from nested_runtime.train.data import Document


def test_streams_join_chats_and_cut_long_texts() -> None:
    texts = [np.arange(5), np.arange(3), np.arange(4)]
    assert streams(texts, 4, packed=True).tolist() == [[0, 1, 2, 3], [4, 0, 1, 2], [0, 1, 2, 3]]
    assert streams(texts, 4, packed=False).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert streams(texts, 99, packed=True).shape == (0, 99)
    assert streams(texts, 99, packed=False).shape == (0, 99)


@torch.inference_mode()
def test_losses_are_those_of_one_pass(loaded: LoadedModel) -> None:
    tokens = torch.randint(5, loaded.model.vocab_size, (2, 601), generator=torch.Generator().manual_seed(0))
    hidden, _ = loaded.model.scan(tokens[:, :-1], None, 0)
    logits = loaded.model.logits(hidden.flatten(0, 1))
    whole = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(2, 600)
    torch.testing.assert_close(token_losses(loaded.model, tokens), whole, atol=2e-3, rtol=1e-3)


def held_out(rng: random.Random, size: int) -> str:
    while True:
        text = " ".join(rng.choice(("red", "blue", "old", "boat", "sea")) for _ in range(size))
        if Document(text).held_out:
            return text


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = random.Random(0)
    prose = [{"text": held_out(rng, LENGTH // 3)} for _ in range(2)] + [{"text": "never held out, I hope"}]
    chats = []
    while len(chats) < 8:
        messages = (("user", f"hello {rng.random()} " + "word " * 200), ("assistant", "good day"))
        stripped = tuple((role, text.strip()) for role, text in messages)
        if Document("", stripped).held_out:
            chats.append({"messages": [{"role": role, "content": text} for role, text in messages]})
    for name, rows in (("pretrain_1_x", prose), ("chat_1_x", chats)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def test_fluency_of_a_model_and_its_control(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path, calm_folders: tuple[Path, Path]
) -> None:
    out = tmp_path / "out"
    model, control = map(str, calm_folders)
    main(["fluency", "--model", model, "--control", control, "--data", str(data), "--out", str(out)])
    (path,) = out.iterdir()
    body = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["model"], row["text"]) for row in body["rows"]] == [
        (model, text) for model in ("tiny-hope", "tiny-transformer") for text in ("chats", "prose")
    ]
    assert all(math.isfinite(row["inside"]) and math.isfinite(row["beyond"]) for row in body["rows"])
    assert body["control"]["name"] == "tiny-transformer"
    assert "first 512" in capsys.readouterr().out


def test_without_data_it_says_that_it_skips(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    main(["fluency", "--model", str(folder)])
    assert "SKIPPED" in capsys.readouterr().err
