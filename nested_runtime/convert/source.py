"""A Hugging Face checkpoint folder, read without trusting it: JSON and safetensors only, nothing is ever executed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nested_runtime.errors import CheckpointError

__all__ = ["Source"]

MAX_JSON = 64 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

UNSAFE = (
    "loading those can run code, so they are refused. Use a safetensors version of the checkpoint (docs/convert.md)"
)
NESTED_LEARNING = re.compile(r"blocks\.[0-9]+\.(attn\.qkv|selfmod|titan_memory|cms\.blocks)\b")


class Source:
    """The folder's config and where each tensor lies."""

    def __init__(self, folder: Path) -> None:
        if folder.is_file() and folder.suffix in PICKLES:
            raise CheckpointError(f"{folder} is a pickle file; {UNSAFE}")
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; give one with config.json and *.safetensors")
        self.folder = folder
        self._refuse_nested_learning()
        if not (folder / "config.json").exists() and any(p.suffix in PICKLES for p in folder.iterdir()):
            raise CheckpointError(self._why_no_weights())
        self.config = self.json("config.json")
        for file in ("config.json", "tokenizer_config.json"):
            if "auto_map" in self.json(file, optional=True):
                raise CheckpointError(
                    f"{folder / file}: auto_map asks for code of the checkpoint to be run; that is never done. "
                    "Use a checkpoint of an architecture that nested-convert knows"
                )
        if "quantization_config" in self.config:
            raise CheckpointError(f"{folder / 'config.json'}: the weights are quantized; use the original checkpoint")
        self.files = self._index()

    def _refuse_nested_learning(self) -> None:
        path = self.folder / "model.safetensors"
        if path.is_file() and any(NESTED_LEARNING.match(name) for name in self._names(path)):
            raise CheckpointError(
                f"{path} holds a model of the nested-learning package. None of its block variants is a model of this "
                "runtime: attention without positions, with a LayerNorm behind it, MLPs with a LayerNorm and biases, "
                "update rules of its own. Its weights would compute something else here; train anew with nested-train"
            )

    def json(self, name: str, *, optional: bool = False) -> dict[str, Any]:
        """An object from a JSON file of the folder; {} if it may be and is absent."""
        path = self.folder / name
        if optional and not path.exists():
            return {}
        text = self.text(name)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} must hold an object, got {type(value).__name__}")
        return value

    def text(self, name: str) -> str:
        """A text file of the folder."""
        path = self.folder / name
        try:
            if path.stat().st_size > MAX_JSON:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the limit is {MAX_JSON}")
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    def _index(self) -> dict[str, Path]:
        """Tensor name -> file."""
        listed = self.json("model.safetensors.index.json", optional=True).get("weight_map")
        if listed is None:
            if not (self.folder / "model.safetensors").is_file():
                raise CheckpointError(self._why_no_weights())
            return dict.fromkeys(self._names(self.folder / "model.safetensors"), self.folder / "model.safetensors")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise CheckpointError(f"{self.folder / 'model.safetensors.index.json'}: weight_map is not names to files")
        found: dict[str, Path] = {}
        for file in sorted(set(listed.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"model.safetensors.index.json names {file!r}, not a .safetensors file beside it")
            found.update(dict.fromkeys(self._names(self.folder / file), self.folder / file))
        lost = sorted(set(listed) - set(found))
        if lost:
            raise CheckpointError(f"tensors of the index that are in no file: {', '.join(lost)}")
        return found

    def _why_no_weights(self) -> str:
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            return f"{self.folder} holds its weights as pickle files only ({', '.join(pickles[:3])}); {UNSAFE}"
        return f"{self.folder}: model.safetensors is missing"

    def _names(self, path: Path) -> list[str]:
        try:
            with safe_open(path, "pt") as file:
                return list(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None

    def read(self, names: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Tensors by name, each of the expected shape, finite and of a floating-point type; every misfit is listed."""
        tensors, problems = {}, []
        for name, shape in names.items():
            try:
                with safe_open(self.files[name], "pt") as file:
                    tensor: torch.Tensor = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.files[name]}: {name}: {error}") from None
            if tuple(tensor.shape) != shape:
                problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
            elif not tensor.is_floating_point():
                problems.append(f"{name} has type {tensor.dtype}, expected a floating-point type")
            elif not bool(tensor.isfinite().all()):
                problems.append(f"{name} holds NaN or infinity")
            else:
                tensors[name] = tensor
        if problems:
            raise CheckpointError(f"{self.folder}: {'; '.join(problems)}")
        return tensors
