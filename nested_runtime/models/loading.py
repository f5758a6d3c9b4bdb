"""Model folders: `config.json` + `model.safetensors` + `tokenizer.json`. Nothing in a folder is ever executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nested_runtime.errors import CheckpointError, ConfigError
from nested_runtime.hub_tokenizer import HubTokenizer
from nested_runtime.models.base import LanguageModel
from nested_runtime.registry import FAMILIES
from nested_runtime.tokenizer import Tokenizer

__all__ = ["LoadedModel", "build", "load", "load_tokenizer", "resolve", "save_model", "save_tensors"]

SHIPPED = Path(__file__).parent.parent / "checkpoints"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to serve. `fingerprint` binds session states to config, weights and tokenizer."""

    id: str
    model: LanguageModel
    tokenizer: Tokenizer
    config: Mapping[str, Any]
    fingerprint: str
    folder: Path


def build(family: str, fields: Mapping[str, Any], *, empty: bool = False) -> LanguageModel:
    """A model of a registered family with fresh parameters, or with none yet: `empty` takes no memory."""
    with torch.device("meta") if empty else nullcontext():
        model: LanguageModel = FAMILIES.get(family).from_config(fields)
    return model


def resolve(name: str) -> Path:
    """Folder of a model given by path or by the name of a shipped checkpoint."""
    for folder in (Path(name), SHIPPED / name):
        if (folder / "config.json").is_file():
            return folder
    shipped = sorted(p.parent.name for p in SHIPPED.glob("*/config.json"))
    raise CheckpointError(
        f"unknown model {name!r}: no such folder with a config.json; shipped: {', '.join(shipped) or 'none'}"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("family"), str):
        raise CheckpointError(f"{path}: field 'family' is missing; expected one of {', '.join(FAMILIES)}")
    return config


def _read_weights(path: Path, model: LanguageModel) -> None:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    expected = model.state_dict()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        raise CheckpointError(f"{path}: missing tensors {missing or 'none'}; unexpected tensors {extra or 'none'}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} has type {tensor.dtype}, expected a floating-point type")
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, expected {list(expected[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds non-finite values")
    model.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()})


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, ours or one of a Hugging Face checkpoint."""
    return HubTokenizer.load(folder) if (folder / "chat.json").exists() else Tokenizer.load(folder)


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat.json"):
        if name == "chat.json" and not (folder / name).exists():
            continue
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def load(name: str, dtype: torch.dtype = torch.float32, *, int8: bool = False) -> LoadedModel:
    """Load a folder or a shipped checkpoint; `int8`: quantised (`LanguageModel.quantize`), with another fingerprint.

    CheckpointError names the file and what is wrong with it.
    """
    folder = resolve(name)
    config = _read_config(folder)
    fields = {k: v for k, v in config.items() if k not in ("family", "name")}
    try:
        model = build(config["family"], fields)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    _read_weights(folder / "model.safetensors", model)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer has {tokenizer.vocab_size} tokens, the model only {model.vocab_size}"
        )
    model = model.to(dtype).eval().requires_grad_(False)
    fingerprint = _fingerprint(folder)
    if int8:
        model.quantize()
        fingerprint = hashlib.sha256(f"int8 {fingerprint}".encode()).hexdigest()[:32]
    return LoadedModel(str(config.get("name", folder.name)), model, tokenizer, config, fingerprint, folder)


def save_model(
    folder: Path, family: str, model: LanguageModel, tokenizer: Tokenizer, name: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Write a model folder; every file is replaced as a whole."""
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    save_tensors(folder, family, tensors, model.to_config(), tokenizer, name)


def save_tensors(
    folder: Path, family: str, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any], tokenizer: Tokenizer,
    name: str | None = None,
) -> None:  # fmt: skip
    """Write a model folder from tensors as they are; every file is replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "part"
    save_file(dict(tensors), part)
    part.replace(folder / "model.safetensors")
    config = {"family": family, **({"name": name} if name else {}), **fields}
    part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / "config.json")
    tokenizer.save(folder)
