"""A model's blocks as one call of the C++ kernels, where they can serve it; packed again when a parameter changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn

from nested_runtime.kernels.dispatch import packed_kernels
from nested_runtime.memory.self_modifying import SelfModifying

if TYPE_CHECKING:
    from nested_runtime.kernels.native.stack import BlockWeights, Linear, Stack
    from nested_runtime.models.blocks import Block

__all__ = ["Fused", "Packed"]


_VERSION = attrgetter("_version")


class Packed(NamedTuple):
    """The blocks, with the last norm, and the output matrix."""

    stack: Stack
    unembed: Linear


class Fused:
    """Holds the packed form of a model; a copy of the model starts with none."""

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._addresses: list[Callable[[], int]] = []
        self._stamp: tuple[int, list[int]] | None = None
        self._packed: Packed | None = None

    def __reduce__(self) -> tuple[type[Fused], tuple[()]]:
        return Fused, ()

    def get(self, model: nn.Module, make: Callable[[], Packed | None]) -> Packed | None:
        """What `make` made of the model's parameters as they are; None where it cannot, or while autograd records.

        Writing to a parameter's `.data`, or putting another tensor there, is not noticed, as by autograd.
        """
        if torch.is_grad_enabled():
            return None
        if not self._parameters:
            self._parameters = list(model.parameters())
            firsts = [next(module.parameters(recurse=False), None) for module in model.modules()]
            self._addresses = [first.data_ptr for first in firsts if first is not None]  # a module moves as a whole
        versions = 0 if self._parameters[0].is_inference() else sum(map(_VERSION, self._parameters))  # none ever falls
        stamp = (versions, [address() for address in self._addresses])
        if stamp != self._stamp:
            self._packed, self._stamp = make(), stamp
        return self._packed


def pack(blocks: Iterable[nn.Module], embed: torch.Tensor, scale: float, last_norm: torch.Tensor) -> Packed | None:
    """Pack a `BlockModel`'s blocks and embeddings; None unless the C++ kernels serve them. Levels are left out."""
    stack = [cast("Block", block) for block in blocks]
    rule, types = stack[0].memory, {type(block.memory) for block in stack}
    dtypes = {parameter.dtype for block in stack for parameter in block.parameters()}
    if types != {SelfModifying} or not isinstance(rule, SelfModifying) or dtypes != {embed.dtype}:
        return None
    kernels = packed_kernels(embed.device.type, embed.dtype)
    inputs = (embed.shape[1], rule.w_out.shape[1], stack[0].cms.up[0].shape[0])
    if kernels is None or kernels.name != "native" or any(size % 2 for size in inputs):
        return None
    from nested_runtime.kernels.native.stack import Linear, Stack

    weights = [_weights(f"blocks.{i}.memory", block) for i, block in enumerate(stack)]
    return Packed(Stack(weights, rule.heads, rule.head_dim, rule.options, embed, scale, last_norm), Linear(embed))


def _weights(name: str, block: Block) -> BlockWeights:
    from nested_runtime.kernels.native.stack import BlockWeights

    rule = cast(SelfModifying, block.memory)
    return BlockWeights(
        name, rule.w_in, rule.w_out, block.cms.up[0], block.cms.down[0], block.norm_memory, block.norm_cms, rule.norm,
        rule.conv, rule.base, rule.rates, rule.gate_bias,
    )  # fmt: skip
