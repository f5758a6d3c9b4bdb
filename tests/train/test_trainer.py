"""The training loop on a tiny model: it learns, it resumes, it refuses what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nested_runtime.errors import CheckpointError, ConfigError
from nested_runtime.models.loading import load
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.cli import load_config, main
from nested_runtime.train.data import Corpus
from nested_runtime.train.trainer import TrainConfig, Trainer

HOPE = {"vocab_size": 512, "dim": 32, "blocks": 1, "heads": 2, "head_dim": 16, "chunk": 16, "mlp_ratio": 2}
CONTROL = {"vocab_size": 512, "dim": 32, "blocks": 1, "heads": 2, "head_dim": 16, "mlp_ratio": 2, "window": 64}
CONFIG = TrainConfig("hope", HOPE, tokens=4 * 32 * 6, lanes=4, length=32, warmup=2, bf16=False, save_every=3)
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path, corpus: Corpus, small_tokenizer: Tokenizer) -> MakeTrainer:
    def make(config: TrainConfig = CONFIG, folder: str = "run", rank: int = 0, world: int = 1) -> Trainer:
        return Trainer(config, small_tokenizer, corpus, tmp_path / folder, rank, world)

    return make


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def momenta(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What the optimizers know, by parameter name and entry."""
    names = {p: name for name, p in trainer.model.named_parameters()}
    return {
        f"{names[p]}:{key}": value.clone()
        for optimizer in trainer.optimizers
        for p, entries in optimizer.state.items()
        for key, value in entries.items()
        if torch.is_tensor(value)
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(("family", "model"), [("hope", HOPE), ("transformer", CONTROL)])
def test_a_tiny_model_learns(make_trainer: MakeTrainer, family: str, model: dict[str, Any]) -> None:
    trainer = make_trainer(replace(CONFIG, family=family, model=model, tokens=8 * 64 * 50, lanes=8, length=64))
    losses = [trainer.train_step()["loss"] for _ in range(trainer.steps)]
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < first - 1.0, f"loss went from {first:.2f} to {last:.2f}"


def test_lanes_carry_their_memory_and_a_fresh_one_is_zero(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(replace(CONFIG, family="transformer", model=CONTROL))
    segments, seen = [], []
    draw = trainer.lanes.next

    def watch(*args: Any) -> Any:
        seen.append(args)
        return trainer.model.__class__.scan(trainer.model, *args)

    def keep() -> Any:
        segments.append(draw())
        return segments[-1]

    trainer.lanes.next = keep  # type: ignore[method-assign]
    trainer.model.scan = watch  # type: ignore[method-assign]
    for step in range(6):
        if step == 3:
            trainer.lanes._at[1] = 1 << 30  # lane 1 has read its session to the end
        trainer.train_step()
    assert [position for _, _, position in seen] == [32 * i for i in range(6)]
    for (_, state, _), segment in zip(seen[1:], segments[1:], strict=True):
        for name, tensor in state.items():
            assert not tensor.requires_grad, name
            assert [bool(t.any()) for t in tensor] == (~segment.fresh).tolist(), name
    assert segments[3].fresh[1], "the test saw no new session"


def test_a_diverged_lane_recovers_with_its_next_session(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.train_step()
    before = parameters(trainer)
    trainer.state = {name: torch.full_like(t, torch.nan) for name, t in trainer.state.items()}  # type: ignore[attr-defined]
    record = trainer.train_step()
    assert record["norm"] != record["norm"]
    assert all(torch.isfinite(t).all() for t in parameters(trainer).values()), "one bad step may not ruin the weights"
    assert before.keys() == parameters(trainer).keys()
    for _ in range(60):
        if torch.isfinite(torch.tensor(trainer.train_step()["loss"])):
            return
    pytest.fail("the lanes never recovered")


def test_resume_continues_where_the_run_stopped(make_trainer: MakeTrainer) -> None:
    first = make_trainer()
    records = list(first.run())
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert {"dev_loss", "dev_value"} <= records[-1].keys()
    again = make_trainer(replace(CONFIG, tokens=4 * 32 * 8))
    assert again.resume()
    assert again.step == 6
    assert_equal(parameters(again), parameters(first))
    assert_equal(momenta(again), momenta(first))
    assert [r["step"] for r in again.run()] == [7, 8]
    assert any(not torch.equal(t, parameters(first)[name]) for name, t in parameters(again).items())


def test_a_new_folder_has_nothing_to_resume(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(folder="empty")
    assert not trainer.resume()
    assert trainer.step == 0


def test_every_process_keeps_the_momenta_it_owns(make_trainer: MakeTrainer) -> None:
    """Two processes share the matrices; what both saved is all of them, for any number of processes."""
    both = [make_trainer(rank=rank, world=2) for rank in (0, 1)]
    for trainer in both:
        for p in trainer.model.parameters():
            p.grad = torch.ones_like(p)  # as after the all-reduce: the same everywhere
        for optimizer in trainer.optimizers:
            optimizer.step()
        trainer.save()
    alone = make_trainer()
    assert alone.resume()
    owned = [momenta(trainer) for trainer in both]
    assert_equal(momenta(alone), owned[1] | owned[0])
    assert owned[0].keys() != owned[1].keys()
    for trainer, expected in zip([make_trainer(rank=rank, world=2) for rank in (0, 1)], owned, strict=True):
        assert trainer.resume()
        matrices = {k: v for k, v in expected.items() if k.endswith("momentum_buffer")}
        assert_equal({k: v for k, v in momenta(trainer).items() if k.endswith("momentum_buffer")}, matrices)


def test_the_exported_model_can_be_served(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.save()
    loaded = load(str(tmp_path / "run" / "model"))
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], tensor, rtol=1e-2, atol=1e-2)


def test_a_run_of_another_model_is_refused(make_trainer: MakeTrainer) -> None:
    make_trainer().save()
    with pytest.raises(ConfigError, match=r"holds a run with model .*choose another folder"):
        make_trainer(replace(CONFIG, model={**HOPE, "dim": 64})).resume()
    with pytest.raises(ConfigError, match="holds a run with family hope"):
        make_trainer(replace(CONFIG, family="transformer", model=CONTROL)).resume()


@pytest.mark.parametrize("name", ["state.json", "checkpoint.safetensors", "optimizer.0.safetensors"])
def test_a_damaged_run_is_refused(make_trainer: MakeTrainer, tmp_path: Path, name: str) -> None:
    make_trainer().save()
    (tmp_path / "run" / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        make_trainer().resume()


def test_a_run_with_a_tensor_less_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer().save()
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors = load_file(path)
    del tensors["norm"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors.*norm"):
        make_trainer().resume()


def test_evaluation_repeats_and_changes_nothing(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.train_step()
    before, state = parameters(trainer), trainer.state
    assert trainer.evaluate(2) == trainer.evaluate(2)
    assert_equal(parameters(trainer), before)
    assert trainer.state is state


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"length": 40}, "'length' is 40: give a multiple of the chunk, 16"),
        ({"tokens": 0}, "'tokens' must be at least 1, got 0"),
        ({"warmup": 0}, "'warmup' must be at least 1"),
        ({"cooldown": 0.0}, "'cooldown' must be a number above 0"),
        ({"clip": float("nan")}, "'clip' must be a number above 0"),
    ],
)
def test_impossible_training_configs_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        replace(CONFIG, **fields).build()


def write_config(path: Path, **fields: Any) -> Path:
    values = {"family": "hope", "model": HOPE, "tokens": 256, "lanes": 2, "length": 32, "bf16": False, "clip": 1}
    path.write_text(json.dumps({k: v for k, v in (values | fields).items() if v is not None}))
    return path


def test_the_shipped_configs_can_be_built() -> None:
    folder = Path(__file__).parents[2] / "nested_runtime" / "train" / "configs"
    sizes = {}
    for path in folder.glob("*.json"):
        sizes[path.stem] = sum(p.numel() for p in load_config(path).build().parameters())
    assert sizes["transformer-nano"] == pytest.approx(sizes["hope-nano"], rel=0.02), "the control has HOPE's size"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"family": "gpt"}, "unknown model family 'gpt'"),
    ({"family": None}, "'family'"),
    ({"model": None}, "'model'"),
    ({"model": {**HOPE, "dim": "big"}}, "'dim'"),
    ({"model": {**HOPE, "dims": 1}}, "'dims'"),
    ({"tokens": "many"}, "'tokens'"),
    ({"speed": 3}, "'speed'"),
    ({"length": 33}, "'length'"),
    ({"mixture": {"first": {"chat": 1}}}, "'mixture.first'"),
    ({"mixture": {"poetry": {}}}, "'poetry'"),
    ({"mixture": 3}, "'mixture'"),
]


def refused_by_command(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in args])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("nested-train: ")
    return lines[0]


@pytest.mark.parametrize(("fields", "named"), BAD)
def test_a_bad_config_is_one_line_and_status_2(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], named: str
) -> None:
    path = write_config(tmp_path / "c.json", **fields)
    line = refused_by_command(capsys, "--config", path, "--data", data_folder, "--out", tmp_path / "run")
    assert named in line
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_bad_paths_and_options_are_one_line_and_status_2(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = write_config(tmp_path / "c.json"), tmp_path / "run"
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for config, data, extra, named in (
        (tmp_path / "none.json", data_folder, [], "none.json"),
        (tmp_path / "broken.json", data_folder, [], "broken.json"),
        (tmp_path / "list.json", data_folder, [], "list.json must hold an object"),
        (good, tmp_path / "nowhere", [], "nowhere is not a folder"),
        (good, data_folder, ["--tokens", 0], "'tokens'"),
        (good, data_folder, ["--workers", 0], "--workers"),
        (good, data_folder, ["--out", good], "c.json"),
    ):
        line = refused_by_command(capsys, "--config", config, "--data", data, "--out", out, *extra)
        assert named in line


def test_the_command_trains_and_goes_on(
    tmp_path: Path, data_folder: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nested_runtime.train.cli.train_tokenizer", lambda *args: small_tokenizer)
    args = ["--config", str(write_config(tmp_path / "c.json")), "--data", str(data_folder)]
    for tokens in ("128", "192"):
        main([*args, "--out", str(tmp_path / "run"), "--tokens", tokens])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3]
    assert load(str(tmp_path / "run" / "model")).model.vocab_size == 512


def test_a_run_starts_from_a_model_folder(
    tmp_path: Path, data_folder: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("nested_runtime.train.cli.train_tokenizer", lambda *args: small_tokenizer)
    first = ["--config", str(write_config(tmp_path / "c.json")), "--data", str(data_folder), "--tokens", "128"]
    main([*first, "--out", str(tmp_path / "first")])
    still = write_config(tmp_path / "still.json", lr_matrix=1e-12, lr_other=1e-12, tokens=64)
    start = ["--config", str(still), "--data", str(data_folder), "--from", str(tmp_path / "first" / "model")]
    main([*start, "--out", str(tmp_path / "second")])
    before, after = (load(str(tmp_path / run / "model")).model.state_dict() for run in ("first", "second"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    other = write_config(tmp_path / "other.json", model={**HOPE, "blocks": HOPE["blocks"] + 1})
    capsys.readouterr()
    line = refused_by_command(capsys, "--config", other, *start[2:], "--out", tmp_path / "third")
    assert "--from" in line
    assert "blocks" in line
