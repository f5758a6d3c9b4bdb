"""Deeper models from trained ones."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from nested_runtime.errors import ConfigError
from nested_runtime.models.loading import LoadedModel, build, load, save_model
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.cli import main
from nested_runtime.train.copy_blocks import SILENT, copy_blocks
from nested_runtime.train.trainer import TrainConfig

SHAPES = {
    "hope": {"vocab_size": 512, "dim": 32, "blocks": 3, "heads": 2, "head_dim": 16, "chunk": 16, "mlp_ratio": 2},
    "titans": {"vocab_size": 512, "dim": 32, "blocks": 3, "heads": 2, "head_dim": 16, "mlp_ratio": 2},
    "transformer": {"vocab_size": 512, "dim": 32, "blocks": 3, "heads": 2, "head_dim": 16, "mlp_ratio": 2},
}
TOKENS = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path, small_tokenizer: Tokenizer) -> LoadedModel:
    """Noise on every parameter, so that no two blocks are alike; the family may be given by the test."""
    family = getattr(request, "param", "hope")
    torch.manual_seed(5)
    model = build(family, SHAPES[family])
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_model(tmp_path / "start", family, model, small_tokenizer, dtype=torch.float32)
    return load(str(tmp_path / "start"))


@pytest.mark.parametrize("start", SHAPES, indirect=True)
def test_the_deeper_model_computes_the_same_until_it_learns(start: LoadedModel) -> None:
    deeper = copy_blocks(start, [2, 0])
    assert deeper.model.to_config()["blocks"] == deeper.config["blocks"] == 5
    model = deeper.model.requires_grad_(True)
    hidden = model.scan(TOKENS, None, 0)[0]
    with torch.no_grad():
        torch.testing.assert_close(hidden, start.model.scan(TOKENS, None, 0)[0], rtol=0, atol=1e-6)
    hidden.square().sum().backward()
    for place in (1, 4):
        for name in SILENT:
            gradient = model.get_parameter(f"blocks.{place}.{name}").grad
            assert gradient is not None
            assert bool(gradient.any()), f"{name} of the copy does not learn"


def test_a_copy_is_its_original_but_for_what_it_puts_out(start: LoadedModel) -> None:
    mine, theirs = copy_blocks(start, [1]).model.state_dict(), start.model.state_dict()
    for name, tensor in theirs.items():
        block, _, rest = name.removeprefix("blocks.").partition(".")
        if name.startswith("blocks."):
            places = {"0": ["0"], "1": ["1"], "2": ["3"]}[block]
            assert all(torch.equal(mine[f"blocks.{place}.{rest}"], tensor) for place in places)
        if name.startswith("blocks.1."):
            copy = mine[f"blocks.2.{rest}"]
            assert not copy.any() if rest in SILENT else torch.equal(copy, tensor)


def test_it_takes_blocks_that_are_there_once_and_models_of_such_blocks(start: LoadedModel) -> None:
    assert copy_blocks(start, []) is start
    for originals, said in (([3], "there is no 3"), ([-1], "there is no -1"), ([1, 0, 1], "twice")):
        with pytest.raises(ConfigError, match=said):
            copy_blocks(start, originals)
    levels = {**SHAPES["hope"], "levels": [{"chunk": 16, "hidden": 24}]}
    with pytest.raises(ConfigError, match="without levels"):
        copy_blocks(replace(start, model=build("hope", levels)), [0])


def test_a_run_starts_from_the_copies_its_config_names(
    tmp_path: Path, data_folder: Path, start: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(
        "hope", {**SHAPES["hope"], "blocks": 4}, tokens=4 * 32 * 2, lanes=4, length=32, warmup=2, bf16=False,
        lr_matrix=1e-9, lr_other=1e-9, copy_blocks=[0], copy_heads={"1.1": "1.0"},
    )  # fmt: skip

    def run(config: TrainConfig, out: str, *arguments: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
        paths = ["--config", str(tmp_path / "config.json"), "--data", str(data_folder), "--out", str(tmp_path / out)]
        main([*paths, *arguments])

    run(config, "run", "--from", str(start.folder))
    grown, rates = load(str(tmp_path / "run/model")).model, start.model.get_parameter("blocks.0.memory.rates")
    for place in (0, 1):
        found = grown.get_parameter(f"blocks.{place}.memory.rates")
        torch.testing.assert_close(found[0], rates[0], rtol=1e-2, atol=0)
        torch.testing.assert_close(found[1], rates[1 - place], rtol=1e-2, atol=0)
    for arguments in ([], ["--from", str(start.folder)]):
        with pytest.raises(SystemExit):
            run(replace(config, copy_blocks=[7]), "refused", *arguments)
        assert "copy_blocks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(replace(config, copy_blocks=[]), "refused", "--from", str(start.folder))
    assert "blocks" in capsys.readouterr().err
