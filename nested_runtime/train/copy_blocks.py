"""A deeper model from a trained one, by copies of blocks that add nothing yet.

Block expansion (Wu et al. 2024, LLaMA Pro, arXiv 2401.02415): a copy stands behind its original, and its memory and its
MLP both put zero into the stream. The deeper model computes what the trained one does, and what the copies are for is
learned from there; unlike there the originals go on learning. States do not go from one to the other: a session has the
copies' memories too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nested_runtime.errors import ConfigError
from nested_runtime.models.blocks import BlockModel
from nested_runtime.models.loading import LoadedModel, build

__all__ = ["copy_blocks"]

SILENT = ("memory.w_out", "cms.down.0")  # what a block adds to the stream comes through one of these


@torch.no_grad()
def copy_blocks(loaded: LoadedModel, originals: Sequence[int]) -> LoadedModel:
    """The model with a silent copy behind each block in `originals`, counted from 0 in the model as it is.

    ConfigError: no such block, a block named twice, a model of other blocks or with levels.
    """
    if not originals:
        return loaded
    model, fields = loaded.model, loaded.model.to_config()
    if not isinstance(model, BlockModel) or model.adaptation is not None:
        raise ConfigError(f"config field 'copy_blocks' is for HOPE's families without levels, not {fields}")
    count = len(model.blocks)
    if wrong := [b for b in originals if b not in range(count)]:
        raise ConfigError(f"config field 'copy_blocks' names blocks from 0 to {count - 1}; there is no {wrong[0]}")
    if len(set(originals)) < len(originals):
        raise ConfigError(f"config field 'copy_blocks' names a block twice: {list(originals)}")
    sources = [(block, silent) for block in range(count) for silent in (False, True)[: 1 + (block in originals)]]
    deeper = build(str(loaded.config["family"]), {**fields, "blocks": len(sources)}).eval().requires_grad_(False)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("blocks.")}
    for place, (block, silent) in enumerate(sources):
        for name, tensor in model.blocks[block].state_dict().items():
            state[f"blocks.{place}.{name}"] = torch.zeros_like(tensor) if silent and name in SILENT else tensor
    deeper.load_state_dict(state)
    return replace(loaded, model=deeper, config={**loaded.config, "blocks": len(sources)}, fingerprint="")
