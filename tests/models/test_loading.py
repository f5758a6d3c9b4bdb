"""Model folders: what is written is what is read, and every damage is named."""

from __future__ import annotations

import json
import pickle  # noqa: TID251  # to prove that nothing unpickles
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nested_runtime.errors import CheckpointError, ConfigError
from nested_runtime.models.base import LanguageModel
from nested_runtime.models.loading import build, load, resolve, save_model
from nested_runtime.registry import FAMILIES
from nested_runtime.tokenizer import SPECIAL, Tokenizer

MakeModel = Callable[..., LanguageModel]


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(str(folder))
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not named in: {caught.value}"
    assert "\n" not in str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_save_and_load_give_the_same_model(
    family: str, tmp_path: Path, tokenizer: Tokenizer, make_model: MakeModel
) -> None:
    model = make_model(family, vocab_size=300)
    save_model(tmp_path / "m", family, model, tokenizer, name="mine", dtype=torch.float64)
    loaded = load(str(tmp_path / "m"), torch.float32)
    assert loaded.id == "mine"
    assert loaded.config["family"] == family
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.tokenizer.encode("Rex €") == tokenizer.encode("Rex €")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.float()), name


def test_saving_twice_gives_one_fingerprint_and_no_leftovers(checkpoint: Path, tokenizer: Tokenizer) -> None:
    first = load(str(checkpoint))
    save_model(checkpoint, "hope", first.model, tokenizer, dtype=torch.float32)
    assert load(str(checkpoint)).fingerprint == first.fingerprint
    assert sorted(p.name for p in checkpoint.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert first.id == "tiny"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_the_fingerprint_covers_every_file(checkpoint: Path, name: str) -> None:
    before = load(str(checkpoint)).fingerprint
    if name == "model.safetensors":
        rewrite(checkpoint, lambda tensors: tensors["norm"].add_(1e-3))
    else:
        (checkpoint / name).write_text(json.dumps(json.loads((checkpoint / name).read_text()), indent=7))
    assert load(str(checkpoint)).fingerprint != before


def test_missing_and_unexpected_tensors_are_named(checkpoint: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.0.surplus"] = tensors.pop("blocks.1.memory.w_in")

    rewrite(checkpoint, change)
    refused(checkpoint, "model.safetensors", "missing tensors ['blocks.1.memory.w_in']", "['blocks.0.surplus']")


def test_a_misshapen_tensor_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update(norm=torch.ones(17)))
    refused(checkpoint, "model.safetensors", "norm has shape [17], expected [16]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_tensor_is_named(checkpoint: Path, value: float) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["embed"][3, 2] = value

    rewrite(checkpoint, poison)
    refused(checkpoint, "model.safetensors", "embed holds non-finite values")


def test_a_tensor_of_integers_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update(norm=torch.ones(16, dtype=torch.int64)))
    refused(checkpoint, "model.safetensors", "norm has type torch.int64")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    refused(checkpoint, name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'{"a": 1}'])
def test_damaged_files_are_named(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    refused(checkpoint, name)


def test_truncated_weights_are_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(checkpoint, "model.safetensors")


def test_nothing_in_a_folder_is_executed(checkpoint: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "exploded",)

    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        kept = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(pickle.dumps(Bomb()))
        refused(checkpoint, name)
        (checkpoint / name).write_bytes(kept)
    reconfigure(checkpoint, family="os:system")
    refused(checkpoint, "unknown model family 'os:system'")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"family": "gpt"}, ["unknown model family 'gpt'", "hope"]),
        ({"family": None}, ["'family'"]),
        ({"dim": -4}, ["'dim'", "-4"]),
        ({"wings": 2}, ["'wings'"]),
        ({"chunk": "32"}, ["'chunk'", "'32'"]),
        ({"read": "nothing"}, ["read", "'nothing'"]),
        ({"dim": 32}, ["model.safetensors", "shape"]),
    ],
)
def test_a_bad_config_is_named(checkpoint: Path, fields: dict[str, object], words: list[str]) -> None:
    reconfigure(checkpoint, **fields)
    refused(checkpoint, *(["config.json"] if "dim" not in fields or fields["dim"] == -4 else []), *words)


def test_a_tokenizer_larger_than_the_model_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, make_model: MakeModel
) -> None:
    save_model(tmp_path / "small", "hope", make_model("hope", vocab_size=299), tokenizer)
    refused(tmp_path / "small", "tokenizer has 300 tokens, the model only 299")


def test_a_tokenizer_with_a_far_id_is_refused(checkpoint: Path) -> None:
    """Few entries, but one of them is beyond the embedding."""
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[next(k for k, v in vocabulary.items() if v == 299)] = 5000
    path.write_text(json.dumps(content))
    refused(checkpoint, "tokenizer has 5001 tokens, the model only 300")


def test_a_tokenizer_that_is_not_byte_level_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["▁the"] = vocabulary.pop(next(k for k, v in vocabulary.items() if v == 299))
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    refused(checkpoint, "tokenizer.json", "'▁the'", "byte-level")


def test_special_tokens_must_lead_the_vocabulary(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    path.write_text(path.read_text().replace(SPECIAL[3], "<|other|>"))
    refused(checkpoint, "tokenizer.json", SPECIAL[3])


def test_an_unknown_model_lists_what_is_shipped(tmp_path: Path) -> None:
    for name in (str(tmp_path), "no-such-model", "nul\0"):
        with pytest.raises(CheckpointError, match=r"unknown model .*no such folder with a config\.json; shipped:"):
            resolve(name)


def test_an_unknown_family_lists_the_known_ones() -> None:
    known = ", ".join(FAMILIES)
    with pytest.raises(ConfigError, match=f"unknown model family 'gpt'; known: {known}"):
        build("gpt", {})
