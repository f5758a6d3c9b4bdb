"""The start of a new run from a model that exists, levels or units of its MLPs being added on the way."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from nested_runtime.errors import ConfigError
from nested_runtime.models.base import LanguageModel
from nested_runtime.models.level_fields import LevelFields
from nested_runtime.models.loading import LoadedModel, build, load

if TYPE_CHECKING:
    from nested_runtime.train.trainer import TrainConfig

__all__ = ["check_start", "levels_of", "start_from", "train_only_levels"]

LENGTH = 256  # tokens of a segment, at least two chunks: the second shows what a step was worth
OF_LEVELS = tuple(field.name for field in fields(LevelFields))


def check_start(loaded: LoadedModel, family: str, model: LanguageModel) -> None:
    """ConfigError names the first field in which the checkpoint is not the model to be trained.

    Fields of levels may differ, and `mlp_ratio` may be larger.
    """
    found = {"family": loaded.config["family"], **_plain(loaded.model)}
    wanted = {"family": family, **_plain(model)}
    for name in sorted(wanted):
        before, after = found.get(name), wanted[name]
        if before != after and not (name == "mlp_ratio" and before is not None and before < after):
            raise ConfigError(
                f"its {name} is {before!r}, the config says {after!r}; only the fields of levels "
                f"({', '.join(OF_LEVELS)}) may differ, and mlp_ratio may grow"
            )


def levels_of(name: str | None) -> TrainConfig:
    """The config of meta-training the starts and step sizes of a model's levels (first order), all else kept as it is.

    Segments begin with an empty window, so that what helps the next one must be in the levels. ConfigError: no levels.
    """
    from nested_runtime.train.trainer import TrainConfig  # it imports this file

    if name is None:
        raise ConfigError("nested-train needs --config, or --from with a model that has levels")
    loaded = load(name)
    chunk = loaded.model.update_chunk
    if not chunk:
        raise ConfigError(f"--from {name}: the model has no levels to train; give a --config that adds some")
    length = chunk * max(2, -(-LENGTH // chunk))
    return TrainConfig(
        loaded.config["family"], loaded.model.to_config(), tokens=1_000_000, length=length, lanes=8, lr_matrix=0.005,
        lr_other=0.03, weight_decay=0.0, only_levels=True, carry_kv=False, warmup=20,
    )  # fmt: skip


def start_from(model: LanguageModel, loaded: LoadedModel) -> list[str]:
    """Give `model` the checkpoint's parameters; the names of those that stay fresh, all of levels.

    A level starts with a zero output, so that until its first step the model computes what the checkpoint does; so do
    the new units of a wider MLP (W_down relu(W_up z)^2). A level the checkpoint has too, of the same shape, is taken
    over.
    """
    mine, theirs = model.state_dict(), loaded.model.state_dict()
    taken = {name: theirs[name] for name, t in mine.items() if name in theirs and theirs[name].shape == t.shape}
    for name in mine.keys() & theirs.keys() - taken.keys():
        units = {"up": 0, "down": 1}.get(name.split(".")[-2]) if ".cms." in name and ".levels." not in name else None
        if units is not None:
            taken[name] = _widened(theirs[name], mine[name], units)
    model.load_state_dict({**mine, **taken})
    return sorted(mine.keys() - taken.keys())


def _widened(old: torch.Tensor, fresh: torch.Tensor, units: int) -> torch.Tensor:
    """`fresh` with the matrix `old` in its first rows (units = 0) or columns (1); further columns are zero."""
    wide = fresh.clone() if units == 0 else torch.zeros_like(fresh)
    wide.narrow(units, 0, old.shape[units]).copy_(old)
    return wide


def train_only_levels(model: LanguageModel, family: str) -> None:
    """Freeze what the same model without levels has too: its answers without levels stay what they were.

    Stacked levels start as the static MLPs of their blocks, so those learn too.
    """
    fields = model.to_config()
    kept = set(build(family, _plain(model), empty=True).state_dict())
    if fields.get("cms") == "stacked":
        learning = [f"blocks.{i}.cms." for i in range(fields["blocks"] - fields["adaptive_blocks"], fields["blocks"])]
        kept = {name for name in kept if not name.startswith(tuple(learning))}
    names = {name for name, _ in model.named_parameters()}
    if names <= kept:
        raise ConfigError("config field 'only_levels' is true, but 'model.levels' is empty: nothing is left to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in kept)


def _plain(model: LanguageModel) -> dict[str, Any]:
    """The config without levels."""
    return {name: value for name, value in model.to_config().items() if name not in OF_LEVELS}
