"""Ablation and adaptation: what they train and read, and that the figures are what they say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from nested_runtime.evals import ablation, adaptation, small_setting
from nested_runtime.evals.cli import main
from nested_runtime.models.loading import LoadedModel, build, load, save_model
from nested_runtime.registry import FAMILIES
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.messages import Weights


def run(capsys: pytest.CaptureFixture[str], out: Path, *argv: str) -> tuple[str, dict[str, Any]]:
    main([*argv, "--out", str(out)])
    (path,) = out.glob(f"{argv[0]}-*.json")
    return capsys.readouterr().out, json.loads(path.read_text(encoding="utf-8"))


# ---- ablation --------------------------------------------------------------------------------------------------------


def test_a_round_of_recall_asks_for_the_newest_values() -> None:
    for seed in range(20):
        session = small_setting.recall_round(random.Random(seed))
        asked = np.flatnonzero(session.weights == Weights.value)[::2]  # the first of the two tokens of a value
        tokens = session.tokens.tolist()
        assert 4 <= len(asked) <= 10
        for at in asked:
            key, value = tokens[at - 1], tokens[at : at + 2]
            before = [tokens[i + 1 : i + 3] for i in range(asked[0] - 1) if tokens[i] == key]
            assert value in before


def test_all_rows_of_a_seed_read_the_same_tokens() -> None:
    trainers = [
        small_setting.SmallTrainer(small_setting.small_config(family, fields, 1024, seed=5))
        for family, fields in (ablation.ROWS["HOPE"], ablation.ROWS["delta"])
    ]
    first, second = ([trainer.lanes.next() for _ in range(3)] for trainer in trainers)
    for one, other in zip(first, second, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_row_differs_from_the_full_model_in_its_config() -> None:
    configs = [json.dumps([family, fields]) for family, fields in ablation.ROWS.values()]
    assert len(set(configs)) == len(configs)
    for family, fields in ablation.ROWS.values():
        small_setting.small_config(family, fields, 1024, 0).build()


def test_ablation_trains_prints_and_goes_on_where_it_stopped(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("ablation", "--tokens", "2048", "--seeds", "2", "--rows", "delta", "- CMS")
    table, body = run(capsys, tmp_path, *options)
    assert "delta" in table
    assert [row["name"] for row in body["rows"]] == ["delta", "- CMS"]
    assert len(body["cells"]) == 4
    row = body["rows"][0]
    losses = [cell["dev_loss"] for cell in body["cells"] if cell["row"] == "delta"]
    assert row["dev_loss"] == pytest.approx(sum(losses) / 2)
    assert row["dev_loss_std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)

    def trained_again(*_: object) -> None:
        raise AssertionError("a cell that exists is not trained again")

    monkeypatch.setattr(ablation, "SmallTrainer", trained_again)
    next(tmp_path.glob("ablation-*.json")).unlink()
    assert run(capsys, tmp_path, *options)[1]["rows"] == body["rows"]
    with pytest.raises(AssertionError, match="not trained again"):
        main([*options[:2], "3072", *options[3:], "--out", str(tmp_path)])


def test_an_unknown_row_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ablation", "--rows", "everything"])
    assert "'everything' is not a row; known: HOPE, - CMS" in capsys.readouterr().err


# ---- adaptation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leveled(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random HOPE with two levels whose steps are large enough to be seen."""
    tokenizer: Tokenizer = small_setting.tokenizer_of(512)
    torch.manual_seed(3)
    levels = [{"chunk": 16, "hidden": 8, "rate": 0.05}, {"chunk": 32, "hidden": 8, "rate": 0.05}]
    model = build(
        "hope",
        {**small_setting.SHAPE, "vocab_size": 512, "blocks": 2, "dim": 16, "head_dim": 8, "chunk": 8, "levels": levels},
    )
    folder = tmp_path_factory.mktemp("leveled") / "model"
    save_model(folder, "hope", model, tokenizer, dtype=torch.float32)
    return load(str(folder))


def test_users_have_sessions_of_equal_length_that_are_their_own(leveled: LoadedModel) -> None:
    tokens, weights = adaptation.users(leveled.tokenizer, 3, 4, 64, seed=1)
    assert tokens.shape == weights.shape == (3, 4, 65)
    assert len({tuple(session) for user in tokens for session in user}) == 12
    again, _ = adaptation.users(leveled.tokenizer, 3, 4, 64, seed=1)
    assert np.array_equal(tokens, again)


@pytest.mark.parametrize("steps", [True, False])
def test_carried_losses_are_those_of_one_long_reading(leveled: LoadedModel, steps: bool) -> None:
    model = leveled.model if steps else adaptation.without_steps(leveled)
    tokens, weights = adaptation.users(leveled.tokenizer, 2, 3, 64, seed=2)
    found = adaptation.compare(model, tokens, weights)
    read = torch.from_numpy(tokens[:, :, :-1].reshape(2, -1))
    with torch.no_grad():
        logits = model.logits(model.scan(read, None, 0)[0].flatten(0, 1)).view(2, 3, 64, -1)
        fresh = model.logits(model.scan(torch.from_numpy(tokens[:, 2, :-1]), None, 0)[0].flatten(0, 1))
    targets = torch.from_numpy(tokens[:, :, 1:])
    losses = cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(2, 3, 64).mean(2)
    np.testing.assert_allclose(found.all["carried"], losses[:, 1:], rtol=1e-4)
    alone = cross_entropy(fresh, targets[:, 2].flatten(), reduction="none").view(2, 64).mean(1)
    np.testing.assert_allclose(found.all["reset"][:, 1], alone, rtol=1e-4)
    assert not np.allclose(found.all["other"], found.all["carried"], rtol=1e-5)


def test_without_steps_nothing_but_the_levels_differs(leveled: LoadedModel) -> None:
    still = adaptation.without_steps(leveled)
    tokens = torch.randint(5, 500, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (moving, _), (held, state) = leveled.model.scan(tokens, None, 0), still.scan(tokens, None, 0)
    torch.testing.assert_close(moving[:, :16], held[:, :16])
    assert (moving[:, 16:] - held[:, 16:]).abs().max() > 1e-4
    assert not any(t.any() for name, t in state.items() if ".delta." in name)


def test_the_command_compares_levels_on_and_off(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, leveled: LoadedModel
) -> None:
    options = ("--users", "2", "--sessions", "3", "--length", "64", "--model", str(leveled.folder))
    table, body = run(capsys, tmp_path, "adaptation", *options)
    assert "carried < reset" in table
    assert [row["levels"] for row in body["rows"]] == ["CMS on", "CMS on", "CMS off", "CMS off"]
    assert all(row["boundaries"] <= 4 for row in body["rows"])
    assert body["rows"][0]["loss"] != body["rows"][2]["loss"]


def test_a_length_between_chunks_is_refused(leveled: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["adaptation", "--users", "2", "--length", "40", "--model", str(leveled.folder)])
    assert "--length 40 must be a multiple of 16, the chunk" in capsys.readouterr().err


def test_a_memory_that_grows_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    family = FAMILIES.get("hope-attention")
    model = family.from_config({**family.TINY, "vocab_size": 512})
    save_model(tmp_path / "grows", "hope-attention", model, small_setting.tokenizer_of(512))
    with pytest.raises(SystemExit):
        main(["adaptation", "--model", str(tmp_path / "grows")])
    assert "'grows' grows with its tokens" in capsys.readouterr().err
