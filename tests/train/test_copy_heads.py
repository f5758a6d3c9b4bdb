"""Copies of heads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from nested_runtime.errors import ConfigError
from nested_runtime.models.base import LanguageModel
from nested_runtime.models.loading import build, load, save_model
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train import copy_heads as module
from nested_runtime.train.cli import main
from nested_runtime.train.copy_heads import copy_heads
from nested_runtime.train.trainer import TrainConfig

HOPE = {"vocab_size": 64, "dim": 32, "blocks": 2, "heads": 3, "head_dim": 16, "chunk": 16, "mlp_ratio": 2}
CONFIG = TrainConfig("hope", {**HOPE, "vocab_size": 512}, tokens=4 * 32 * 2, lanes=4, length=32, warmup=2, bf16=False)
TOKENS = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> LanguageModel:
    """Noise on every parameter, so that no two heads, blocks or norms are alike."""
    torch.manual_seed(3)
    model = build("hope", HOPE)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def hidden(model: LanguageModel) -> torch.Tensor:
    return model.scan(TOKENS, None, 0)[0]


def silence(model: LanguageModel, block: int, head: int) -> None:
    model.get_submodule(f"blocks.{block}.memory").w_out[:, head * 16 : (head + 1) * 16] = 0  # type: ignore[index,operator]


def test_an_exact_copy_shares_the_work_of_its_original(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPREAD", 0.0)
    silence(model, 1, 2)
    expected = hidden(model)
    copy_heads(model, {"1.2": "1.0"})
    torch.testing.assert_close(hidden(model), expected, rtol=1e-4, atol=1e-5)
    silence(model, 1, 0)
    assert (hidden(model) - expected).abs().max() > 1e-3, "half of the work was the original's"


def test_a_copy_in_another_block_reads_there_what_the_original_would(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPREAD", 0.0)
    copy_heads(model, {"1.1": "0.2"})
    x = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(2))
    outs = []
    for block, head in ((0, 2), (1, 1)):
        memory = model.get_submodule(f"blocks.{block}.memory")
        for other in {0, 1, 2} - {head}:
            silence(model, block, other)
        norm = model.get_parameter(f"blocks.{block}.norm_memory")
        state = {s.name: torch.zeros(1, *s.shape) for s in memory.state()}  # type: ignore[operator]
        outs.append(memory.scan(torch.nn.functional.rms_norm(x, (32,)) * norm, state, 0)[0])  # type: ignore[operator]
    torch.testing.assert_close(outs[1], module.WEIGHT * outs[0], rtol=1e-4, atol=1e-5)


def test_copies_differ_from_their_original_and_from_each_other(model: LanguageModel) -> None:
    copy_heads(model, {"0.1": "0.0", "0.2": "0.0"})
    base = model.get_parameter("blocks.0.memory.base")
    assert (base[1] - base[0]).abs().max() > 0.05
    assert (base[2] - base[1]).abs().max() > 0.05


def test_two_exact_copies_and_their_original_have_a_third_each(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPREAD", 0.0)
    silence(model, 1, 1)
    silence(model, 1, 2)
    expected = hidden(model)
    copy_heads(model, {"1.1": "1.0", "1.2": "1.0"})
    torch.testing.assert_close(hidden(model), expected, rtol=1e-4, atol=1e-5)


def test_an_original_may_not_be_overwritten(model: LanguageModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"'0\.1'"):
        copy_heads(model, {"0.0": "0.1", "0.1": "1.0"})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_head_moves_to_another_block_before_it_is_overwritten(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in two steps: the copy in the other block first."""
    monkeypatch.setattr(module, "SPREAD", 0.0)
    steps = build("hope", HOPE)
    steps.load_state_dict(model.state_dict())
    copy_heads(model, {"0.1": "0.0", "1.0": "0.1"})
    for copies in ({"1.0": "0.1"}, {"0.1": "0.0"}):
        copy_heads(steps, copies)
    assert all(torch.equal(tensor, steps.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["2.0", "0.3", "1", "-1.0", "a.b"])
def test_heads_that_do_not_exist_are_named(model: LanguageModel, name: str) -> None:
    for copies in ({name: "0.0"}, {"0.0": name}):
        with pytest.raises(ConfigError, match="copy_heads") as caught:
            copy_heads(model, copies)
        assert repr(name) in str(caught.value)


def test_memories_of_another_rule_are_refused() -> None:
    plain = {name: value for name, value in HOPE.items() if name != "chunk"}
    with pytest.raises(ConfigError, match="GatedDelta"):
        copy_heads(build("delta", plain), {"0.0": "0.1"})


def test_a_run_starts_from_the_copies_its_config_names(
    tmp_path: Path, data_folder: Path, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "start", "hope", CONFIG.build(), small_tokenizer, dtype=torch.float32)
    fields = {**asdict(CONFIG), "lr_matrix": 1e-9, "lr_other": 1e-9, "copy_heads": {"0.0": "1.2"}}

    def run(*arguments: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps(fields))
        main(["--config", str(tmp_path / "config.json"), "--data", str(data_folder), *arguments])

    run("--out", str(tmp_path / "run"), "--from", str(tmp_path / "start"))
    before, after = (load(str(tmp_path / name)).model for name in ("start", "run/model"))
    original, copy = before.get_parameter("blocks.1.memory.rates")[2], after.get_parameter("blocks.0.memory.rates")[0]
    torch.testing.assert_close(copy, original, rtol=1e-2, atol=0)
    for arguments in ([], ["--from", str(tmp_path / "start")]):
        fields["copy_heads"] = {"0.0": "7.0"}
        with pytest.raises(SystemExit):
            run("--out", str(tmp_path / "refused"), *arguments)
        assert "copy_heads" in capsys.readouterr().err
