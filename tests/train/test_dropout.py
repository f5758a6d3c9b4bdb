"""Dropout of the MLPs: what it changes while training, what it leaves alone, and that runs take it from a config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nested_runtime.errors import ConfigError
from nested_runtime.models.loading import build
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.data import Corpus
from nested_runtime.train.dropout import drop_mlps
from nested_runtime.train.trainer import TrainConfig, Trainer

HOPE = {"vocab_size": 512, "dim": 64, "blocks": 2, "heads": 2, "head_dim": 16, "chunk": 16, "mlp_ratio": 2}
CONFIG = TrainConfig("hope", HOPE, tokens=4 * 32 * 40, lanes=4, length=32, warmup=2, bf16=False)


def grown() -> torch.nn.Module:
    """A model whose MLPs say something: fresh ones are silent."""
    torch.manual_seed(1)
    model = build("hope", HOPE)
    for name, p in model.named_parameters():
        if ".cms." in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def test_an_element_is_dropped_or_scaled_and_its_mean_stays() -> None:
    model = grown()
    mlp = model.get_submodule("blocks.0.cms")
    x = torch.randn(4, 500, 64)
    whole = mlp(x).detach()
    drop_mlps(model, 0.25)
    out = mlp(x).detach()
    kept = out != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(out[kept], whole[kept] / 0.75)


def test_a_forward_without_gradients_is_of_the_whole_model() -> None:
    model = grown()
    tokens = torch.arange(64).view(2, 32)
    before, _ = model.scan(tokens, None, 0)
    drop_mlps(model, 0.5)
    with torch.no_grad():
        after, _ = model.scan(tokens, None, 0)
    torch.testing.assert_close(after, before)
    assert not torch.allclose(model.scan(tokens, None, 0)[0], before, atol=1e-3)


def test_a_run_trains_with_it(tmp_path: Path, corpus: Corpus, small_tokenizer: Tokenizer) -> None:
    def losses(p: float) -> list[float]:
        trainer = Trainer(replace(CONFIG, dropout=p), small_tokenizer, corpus, tmp_path, 0, 1)
        return [trainer.train_step()["loss"] for _ in range(3)]

    assert losses(0.5) == losses(0.5), "a function of the seed"
    assert losses(0.5) != losses(0.0)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_an_impossible_share_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match="'dropout'"):
        replace(CONFIG, dropout=p)
