"""--from: levels on top of a model that exists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nested_runtime.errors import ConfigError
from nested_runtime.models.loading import LoadedModel, load, save_model
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.data import Corpus
from nested_runtime.train.start import check_start, start_from
from nested_runtime.train.trainer import TrainConfig, Trainer

PLAIN = {"vocab_size": 512, "dim": 32, "blocks": 2, "heads": 2, "head_dim": 16, "chunk": 16, "mlp_ratio": 2}
LEVELS = [{"chunk": 16, "hidden": 24, "rate": 0.05}, {"chunk": 32, "hidden": 24, "rank": 4}]
LEVELED = {**PLAIN, "levels": LEVELS}
CONFIG = TrainConfig("hope", LEVELED, tokens=4 * 64 * 8, lanes=4, length=64, warmup=2, bf16=False)


@pytest.fixture
def plain(tmp_path: Path, small_tokenizer: Tokenizer) -> LoadedModel:
    """A model folder without levels whose parameters are not those of a fresh model."""
    model = replace(CONFIG, model=PLAIN).build()
    torch.manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_model(tmp_path / "plain", "hope", model, small_tokenizer, dtype=torch.float32)
    return load(str(tmp_path / "plain"))


def test_a_model_with_new_levels_is_the_checkpoint_until_they_step(plain: LoadedModel) -> None:
    model = CONFIG.build().eval()
    fresh = start_from(model, plain)
    assert fresh, "the checkpoint has no levels"
    assert all(".cms.lev" in name or ".cms.log_rates" in name for name in fresh)
    tokens = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = model.scan(tokens, None, 0)[0], plain.model.scan(tokens, None, 0)[0]
    torch.testing.assert_close(found[:, :16], expected[:, :16], rtol=0, atol=1e-5)
    assert (found[:, 16:] - expected[:, 16:]).abs().max() > 1e-3, "the first step changed nothing"


def test_with_step_size_0_it_is_the_checkpoint_for_ever(plain: LoadedModel) -> None:
    still = [{**level, "rate": 0.0, "learn_rate": False} for level in LEVELS]
    model = replace(CONFIG, model={**PLAIN, "levels": still}).build().eval()
    start_from(model, plain)
    tokens = torch.randint(0, 512, (1, 100), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(
            model.scan(tokens, None, 0)[0], plain.model.scan(tokens, None, 0)[0], rtol=0, atol=1e-5
        )


def test_levels_of_the_same_shape_are_taken_over_others_are_fresh(
    tmp_path: Path, small_tokenizer: Tokenizer, plain: LoadedModel
) -> None:
    leveled = CONFIG.build()
    start_from(leveled, plain)
    leveled.get_parameter("blocks.1.cms.levels.0.down").data.fill_(0.5)
    save_model(tmp_path / "leveled", "hope", leveled, small_tokenizer, dtype=torch.float32)
    changed = replace(CONFIG, model={**PLAIN, "levels": [LEVELS[0], {**LEVELS[1], "rank": 8}]})
    model, loaded = changed.build(), load(str(tmp_path / "leveled"))
    check_start(loaded, "hope", model)
    fresh = start_from(model, loaded)
    assert fresh == [f"blocks.1.cms.levels.1.{name}_in" for name in ("down", "up")]
    assert bool((model.get_parameter("blocks.1.cms.levels.0.down") == 0.5).all())


@pytest.mark.parametrize(
    ("change", "named"), [({"dim": 48}, "dim is 32, the config says 48"), ({"blocks": 1}, "blocks")]
)
def test_only_levels_may_differ(plain: LoadedModel, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_start(plain, "hope", replace(CONFIG, model={**LEVELED, **change}).build())
    with pytest.raises(ConfigError, match="its family is 'hope', the config says 'transformer'"):
        check_start(plain, "transformer", CONFIG.build())


def test_only_levels_learn_when_only_levels_are_asked_for(
    tmp_path: Path, corpus: Corpus, small_tokenizer: Tokenizer, plain: LoadedModel
) -> None:
    trainer = Trainer(replace(CONFIG, only_levels=True), small_tokenizer, corpus, tmp_path / "run", 0, 1)
    fresh = start_from(trainer.model, plain)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for _ in range(4):
        assert trainer.train_step()["norm"] > 0
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(fresh), "the start and the rates of every level, nothing else"
    trainer.save()
    again = Trainer(replace(CONFIG, only_levels=True), small_tokenizer, corpus, tmp_path / "run", 0, 1)
    assert again.resume()
    assert again.train_step()["norm"] > 0


def test_what_cannot_be_trained_is_named() -> None:
    with pytest.raises(ConfigError, match="'length' is 80: give a multiple of the first level's chunk, 32"):
        replace(CONFIG, length=80, model={**PLAIN, "levels": [{"chunk": 32, "hidden": 8}]}).build()
    with pytest.raises(ConfigError, match=r"'only_levels' is true, but 'model\.levels' is empty"):
        replace(CONFIG, only_levels=True, model=PLAIN).build()
