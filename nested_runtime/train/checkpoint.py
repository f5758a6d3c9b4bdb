"""A run folder: weights, optimizer states by parameter name, and where the run stands.

`checkpoint.safetensors` holds the model in float32; `optimizer.<rank>.safetensors` what the optimizers of one process
own, as `<parameter>:<entry>`, so that a run can go on with another number of processes; `state.json` the step and the
config. Every file is replaced as a whole, `state.json` last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nested_runtime.errors import CheckpointError, ConfigError

__all__ = ["load_run", "save_run"]

Optimizers = Iterable[torch.optim.Optimizer]


def save_run(
    folder: Path, model: nn.Module, optimizers: Optimizers, rank: int, step: int, config: Mapping[str, Any]
) -> None:
    """Write what process `rank` owns; rank 0 also the weights and the state."""
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
    owned = {
        f"{names[p]}:{key}": value
        for optimizer in optimizers
        for p, entries in optimizer.state.items()
        for key, value in entries.items()
        if torch.is_tensor(value)
    }
    _write(folder / f"optimizer.{rank}.safetensors", owned)
    if rank == 0:
        _write(folder / "checkpoint.safetensors", model.state_dict())
        part = folder / "state.part"
        part.write_text(json.dumps({"step": step, "config": dict(config)}), encoding="utf-8")
        part.replace(folder / "state.json")


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    part = path.with_suffix(".part")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part)
    part.replace(path)


def load_run(folder: Path, model: nn.Module, optimizers: Optimizers, config: Mapping[str, Any]) -> int | None:
    """Read a run into `model` and `optimizers`, return its step; None where the folder holds no run.

    Raises ConfigError if the run is of another model, CheckpointError for a damaged file.
    """
    if not (folder / "checkpoint.safetensors").exists():
        return None
    step, saved = _read_state(folder / "state.json")
    for field in ("family", "model"):
        if saved.get(field) != config[field]:
            raise ConfigError(
                f"--out {folder} holds a run with {field} {saved.get(field)}, the config says {config[field]}; "
                "choose another folder or the run's own config"
            )
    weights = _read(folder / "checkpoint.safetensors")
    try:
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder / 'checkpoint.safetensors'} does not fit its config: {error}") from None
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for path in sorted(folder.glob("optimizer.*.safetensors")):
        for key, tensor in _read(path).items():
            name, _, entry = key.rpartition(":")
            entries.setdefault(name, {})[entry] = tensor
    _restore(model, optimizers, entries)
    return step


def _restore(model: nn.Module, optimizers: Optimizers, entries: Mapping[str, dict[str, torch.Tensor]]) -> None:
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        owned = [names[p] for group in optimizer.param_groups for p in group["params"]]
        state = {i: entries[name] for i, name in enumerate(owned) if name in entries}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read_state(path: Path) -> tuple[int, Mapping[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return int(content["step"]), dict(content["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}; choose another --out folder") from None


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from None
