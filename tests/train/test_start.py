"""--from: levels on top of a model that exists."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend

from nested_runtime.errors import ConfigError
from nested_runtime.hub_tokenizer import HubTokenizer
from nested_runtime.models.loading import LoadedModel, build, load, save_model
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.cli import main
from nested_runtime.train.data import Corpus
from nested_runtime.train.messages import Dialogue, Message, Span, Weights
from nested_runtime.train.start import check_start, start_from
from nested_runtime.train.templated import FIRST, templated
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


def test_an_mlp_may_grow_and_computes_the_same_until_it_learns(plain: LoadedModel) -> None:
    model = replace(CONFIG, model={**PLAIN, "mlp_ratio": 5}).build()
    check_start(plain, "hope", model)
    assert start_from(model, plain) == []
    tokens = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(3))
    hidden = model.scan(tokens, None, 0)[0]
    with torch.no_grad():
        torch.testing.assert_close(hidden, plain.model.scan(tokens, None, 0)[0], rtol=0, atol=1e-5)
    hidden.sum().backward()
    grown = model.get_parameter("blocks.0.cms.down.0").grad
    assert grown is not None
    assert bool(grown[:, 64:].any()), "the new units do not learn"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dim": 48}, "dim is 32, the config says 48"),
        ({"blocks": 1}, "blocks"),
        ({"mlp_ratio": 1}, "mlp_ratio is 2, the config says 1"),
    ],
)
def test_nothing_else_may_differ(plain: LoadedModel, change: dict[str, Any], named: str) -> None:
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


STACKED = {"chunk": 16, "rank": 4, "rate": 0.05}
LLAMA = {
    "vocab_size": 320, "dim": 32, "blocks": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "hidden": 48, "context": 64,
    "levels": [STACKED], "cms": "stacked",
}  # fmt: skip


def hub_tokenizer(small: Tokenizer) -> HubTokenizer:
    """A ChatML tokenizer with the entries of another."""
    backend = Backend.from_str(small._backend.to_str())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    end = backend.token_to_id("<|im_end|>")
    return HubTokenizer(backend, {"template": template, "eos_token": "<|im_end|>", "end_tokens": [end]})


@pytest.fixture
def converted(tmp_path: Path, small_tokenizer: Tokenizer) -> LoadedModel:
    """As `nested-convert --levels` leaves a model: a tokenizer with a chat template, levels that have not learned."""
    torch.manual_seed(0)
    tokenizer = hub_tokenizer(small_tokenizer)
    model = build("hope-attention", {**LLAMA, "vocab_size": tokenizer.vocab_size})
    for name, parameter in model.named_parameters():
        if name.endswith("w_out"):
            torch.nn.init.normal_(parameter, std=0.1)
    save_model(tmp_path / "converted", "hope-attention", model, tokenizer, dtype=torch.float32)
    return load(str(tmp_path / "converted"))


def test_weights_follow_what_is_said_in_a_chat_template(small_tokenizer: Tokenizer) -> None:
    tokenizer = hub_tokenizer(small_tokenizer)
    said = Message("user", (Span("My dog is called Rex.", Weights.user),))
    answer = (Span("Your dog is called", Weights.answer), Span(" Rexomil", Weights.value), Span(".", Weights.answer))
    ids, weights = templated(Dialogue((said, Message("assistant", answer)), ()), tokenizer)
    assert ids == tokenizer.render([{"role": m, "content": c} for m, c in (
        ("user", "My dog is called Rex."), ("assistant", "Your dog is called Rexomil."),
    )], False)  # fmt: skip
    values = [(i, w) for i, w in zip(ids, weights, strict=True) if w >= Weights.value]
    assert tokenizer.decode([i for i, _ in values]) == " Rexomil"
    assert [w for _, w in values] == [FIRST * Weights.value, *[Weights.value] * (len(values) - 1)]
    closes = [w for i, w in zip(ids, weights, strict=True) if i == tokenizer.end_id]
    assert closes == [0.1, 1.0]
    shouting = HubTokenizer(tokenizer._backend, {**tokenizer.chat, "template": "{{ messages[0].content | upper }}"})
    with pytest.raises(ConfigError, match="does not write 'My dog"):
        templated(Dialogue((said,), ()), shouting)


def test_a_converted_model_is_meta_trained_from_its_folder_alone(
    converted: LoadedModel, data_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    main(["--from", str(converted.folder), "--data", str(data_folder), "--out", str(out), "--tokens", "4000"])
    trained = load(str(out / "model"))
    assert isinstance(trained.tokenizer, HubTokenizer)
    before, after = converted.model.state_dict(), trained.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("blocks.1.cms.")}  # the start of a stacked level is F
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert all(record["norm"] > 0 for record in records)


def test_without_a_config_there_must_be_levels(
    plain: LoadedModel, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, named in (
        ([], "needs --config, or --from"),
        (["--from", str(plain.folder)], "has no levels to train"),
    ):
        with pytest.raises(SystemExit):
            main([*options, "--data", str(data_folder), "--out", str(tmp_path / "run")])
        assert named in capsys.readouterr().err
