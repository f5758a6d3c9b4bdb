"""Checkpoints that do not fit or that are hostile: refused with the reason, nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nested_runtime.convert.cli import convert, main
from nested_runtime.errors import ConfigError
from nested_runtime.models import loading

Checkpoint = Callable[[str], tuple[Path, Any]]


@pytest.fixture
def source(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    """A copy of a good checkpoint, to be spoiled."""
    folder, _ = checkpoint("llama")
    shutil.copytree(folder, tmp_path / "source")
    return tmp_path / "source"


def edit(path: Path, **fields: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**values, **fields}.items() if v is not None}))


def change_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def refusal(source: Path) -> str:
    out = source.parent / "out"
    with pytest.raises(ConfigError) as caught:
        convert(source, out, {})
    assert not out.exists(), "something was written"
    return str(caught.value)


def test_every_missing_and_unexpected_tensor_is_listed(source: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
            del tensors[name]
        tensors["model.layers.0.self_attn.q_proj.lora_A"] = torch.zeros(2)
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)

    change_tensors(source, change)
    message = refusal(source)
    assert "missing tensors ['model.layers.1.mlp.up_proj.weight', 'model.norm.weight']" in message
    assert "unexpected tensors ['model.layers.0.self_attn.q_proj.lora_A', 'model.layers.9.mlp.up_proj" in message


def test_every_wrong_shape_type_and_value_is_listed(source: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.zeros(31)
        tensors["lm_head.weight"] = torch.zeros(320, 32, dtype=torch.int8)
        tensors["model.embed_tokens.weight"][3, 3] = float("nan")

    change_tensors(source, change)
    message = refusal(source)
    assert "model.norm.weight has shape [31], expected [32]" in message
    assert "lm_head.weight has type torch.int8" in message
    assert "model.embed_tokens.weight holds NaN" in message


def test_pickles_are_never_opened(source: Path) -> None:
    (source / "model.safetensors").unlink()
    owned = source.parent / "owned"
    (source / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {owned}'\ntR.".encode())
    assert "pickle files only (pytorch_model.bin)" in refusal(source)
    assert not owned.exists()


def test_a_pickle_given_by_name_or_alone_is_not_opened(tmp_path: Path) -> None:
    """What training frameworks leave: step_000100.pt, without a config.json."""
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "step_000100.pt"
    file.write_bytes(f"cos\nsystem\n(S'touch {tmp_path / 'owned'}'\ntR.".encode())
    assert "is a pickle file; loading those can run code" in refusal(file)
    assert "pickle files only (step_000100.pt)" in refusal(tmp_path / "run")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["attn.qkv.weight", "selfmod.m_k.weight", "cms.blocks.fast.net.1.weight"])
def test_a_model_of_the_nested_learning_package_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "source").mkdir()
    tensors = {"embed.weight": torch.zeros(8, 4), f"blocks.0.{name}": torch.zeros(12, 4)}
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    message = refusal(tmp_path / "source")
    assert "holds a model of the nested-learning package" in message
    assert "train anew" in message


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_never_run(source: Path, file: str) -> None:
    edit(source / file, auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "auto_map asks for code" in refusal(source)


@pytest.mark.parametrize("size", [1 << 62, 1 << 30, 40])
def test_a_header_that_lies_is_refused(source: Path, size: int) -> None:
    (source / "model.safetensors").write_bytes(struct.pack("<Q", size) + b'{"a": 1}')
    assert "not a whole safetensors file" in refusal(source)


def test_a_truncated_file_is_refused(source: Path) -> None:
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-10])
    assert "not a whole safetensors file" in refusal(source)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_cannot_point_elsewhere(source: Path, file: str) -> None:
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    assert "not a .safetensors file beside it" in refusal(source)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; known: gemma, gemma3_text, llama"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"hidden_act": "relu6"}, "activation 'relu6'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"num_key_value_heads": 3}, "not a multiple of kv_heads"),
    ],
)
def test_configs_that_cannot_be_had_name_the_field(source: Path, fields: dict[str, Any], named: str) -> None:
    edit(source / "config.json", **fields)
    assert named in refusal(source)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("config.json", "[1]", "must hold an object"),
        ("config.json", "{" * 100_000, "not JSON"),
        ("tokenizer.json", '{"model": {}}', "not a tokenizer file"),
        ("chat_template.jinja", "{% for %}", "not valid Jinja"),
    ],
)
def test_files_that_are_not_what_they_should_be(source: Path, file: str, content: str, named: str) -> None:
    (source / file).write_text(content)
    assert named in refusal(source)


def test_missing_files_are_named(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(source)
    (source / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(source)
    shutil.rmtree(source)
    assert "is not a folder" in refusal(source)


def test_shards_and_a_tied_head_that_is_stored(tmp_path: Path, checkpoint: Checkpoint) -> None:
    _, theirs = checkpoint("smollm")
    folder, _ = checkpoint("smollm")
    shutil.copytree(folder, tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    convert(folder, tmp_path / "one", {})
    convert(tmp_path / "shards", tmp_path / "many", {})
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    shutil.copytree(folder, tmp_path / "tied")
    change_tensors(tmp_path / "tied", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert(tmp_path / "tied", tmp_path / "out", {})
    change_tensors(tmp_path / "tied", lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConfigError, match="is not the embedding"):
        convert(tmp_path / "tied", tmp_path / "out", {})


def test_the_command_says_it_in_one_line(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(source), str(source.parent / "out"), "--context", "32"])
    assert "3 blocks of 32" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([str(source), str(source.parent / "out2"), "--context", "129"])
    assert caught.value.code == 2
    assert "--context 129 is over max_position_embeddings, 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--levels", "64,"], "--levels '64,' is not a list of whole numbers"),
        (["--levels", "9999999"], "levels.0.chunk is 9999999, more than the context of 128 tokens"),
        (["--levels", "0"], "chunk must be at least 1, got 0"),
        (["--levels", "64,96"], "levels.1.chunk is 96: levels.0.chunk, 64, does not divide it"),
        (["--levels", "64", "--rank", "0"], "rank must be at least 1, got 0"),
        (["--levels", "64", "--rank", "1e9"], "--rank '1e9' is neither a whole number nor dense"),
        (["--levels", "64", "--rank", "999999"], "levels.0.rank is 999999"),
        (["--levels", "64", "--blocks", "last-4"], "--blocks 'last-4' is not one of all, last-half, last-quarter"),
        (["--levels", "64", "--blocks", "first"], "--blocks 'first' is not one of"),
        (["--levels", "64", "--optimizer", "lion"], "unknown optimizer 'lion'"),
        (["--levels", "64", "--optimizer", "dgd"], "'dgd' needs the inputs of one chunk and dense deltas"),
        (["--levels", "64", "--rate", "-1"], "rate must be a finite number, 0 or more, got -1.0"),
        (["--levels", "64", "--rate", "nan"], "rate must be a finite number, 0 or more, got nan"),
    ],
)
def test_impossible_levels_are_named(
    source: Path, options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(source), str(source.parent / "out"), *options])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
    assert not (source.parent / "out").exists()


def test_the_command_adds_levels(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.parent / "out"
    main([str(source), str(out), "--levels", "64,512", "--rank", "dense", "--blocks", "all", "--rate", "0.5"])
    assert "3 blocks of 32, 320 tokens, 3 of them learn" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert [(level["chunk"], level["rank"], level["rate"]) for level in config["levels"]] == [
        (64, None, 0.5), (512, None, 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["blocks.2.cms.levels.0.up_in", "blocks.2.cms.log_rates"])
def test_a_spoiled_start_of_a_level_is_refused_when_it_is_loaded(source: Path, name: str) -> None:
    out = source.parent / "out"
    main([str(source), str(out), "--levels", "64"])
    tensors = load_file(out / "model.safetensors")
    for spoiled, message in ((torch.zeros(3, 3), "has shape"), (tensors[name] * float("nan"), "non-finite")):
        save_file({**tensors, name: spoiled}, out / "model.safetensors")
        with pytest.raises(ConfigError, match=message):
            loading.load(str(out))
