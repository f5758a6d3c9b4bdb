"""A model's blocks as one call of the C++ kernels, where they can serve it; packed again when a parameter changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import nn

from nested_runtime.kernels.dispatch import packed_kernels
from nested_runtime.memory.self_modifying import SelfModifying

if TYPE_CHECKING:
    from nested_runtime.kernels.native.stack import BlockWeights, Linear, Stack
    from nested_runtime.models.blocks import Block

__all__ = ["Fused", "is_served", "pack_output", "pack_stack"]


_VERSION = attrgetter("_version")
P = TypeVar("P")


class Fused(Generic[P]):
    """Holds the packed form of a model's parameters; a copy of the model starts with none."""

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._addresses: list[Callable[[], int]] = []
        self._stamp: tuple[int, list[int]] | None = None
        self.packed: P | None = None

    def __reduce__(self) -> tuple[type[Fused[Any]], tuple[()]]:
        return Fused, ()

    def get(self, parts: nn.Module | nn.Parameter, make: Callable[[], P | None]) -> P | None:
        """What `make` made of the parameters as they are; None where it cannot, or while autograd records.

        `parts` are always the same. Writing to a parameter's `.data`, or putting another tensor there, is not noticed,
        as by autograd.
        """
        if torch.is_grad_enabled():
            return None
        if not self._parameters:
            self._watch(parts)
        versions = 0 if self._parameters[0].is_inference() else sum(map(_VERSION, self._parameters))  # none ever falls
        stamp = (versions, [address() for address in self._addresses])
        if stamp != self._stamp:
            self.packed, self._stamp = make(), stamp
        return self.packed

    def _watch(self, parts: nn.Module | nn.Parameter) -> None:
        if isinstance(parts, nn.Parameter):
            self._parameters, self._addresses = [parts], [parts.data_ptr]
            return
        self._parameters = list(parts.parameters())
        firsts = [next(module.parameters(recurse=False), None) for module in parts.modules()]
        self._addresses = [first.data_ptr for first in firsts if first is not None]  # a module moves as a whole


def pack_stack(
    blocks: Iterable[nn.Module], embed: torch.Tensor, scale: float, last_norm: torch.Tensor, int8: bool = False
) -> Stack | None:
    """Pack a `BlockModel`'s embeddings, blocks and last norm; None unless the C++ kernels serve them."""
    stack = [cast("Block", block) for block in blocks]
    if not is_served(stack, embed):
        return None
    from nested_runtime.kernels.native.stack import Stack

    rule = cast(SelfModifying, stack[0].memory)
    weights = [_weights(f"blocks.{i}.memory", block) for i, block in enumerate(stack)]
    return Stack(weights, rule.heads, rule.head_dim, rule.options, embed, scale, last_norm, int8)


def pack_output(blocks: Iterable[nn.Module], embed: torch.Tensor, int8: bool = False) -> Linear | None:
    """Pack the output matrix; None unless the C++ kernels serve the blocks before it."""
    if not is_served(blocks, embed):
        return None
    from nested_runtime.kernels.native.stack import Linear

    return Linear(embed, int8)


def is_served(blocks: Iterable[nn.Module], embed: torch.Tensor) -> bool:
    """Whether the C++ kernels know the blocks. Levels are left out."""
    stack = [cast("Block", block) for block in blocks]
    rule, types = stack[0].memory, {type(block.memory) for block in stack}
    dtypes = {parameter.dtype for block in stack for parameter in block.parameters()}
    if types != {SelfModifying} or not isinstance(rule, SelfModifying) or dtypes != {embed.dtype}:
        return False
    kernels = packed_kernels(embed.device.type, embed.dtype)
    inputs = (embed.shape[1], rule.w_out.shape[1], stack[0].cms.up[0].shape[0])
    return kernels is not None and kernels.name == "native" and not any(size % 2 for size in inputs)


def _weights(name: str, block: Block) -> BlockWeights:
    from nested_runtime.kernels.native.stack import BlockWeights

    rule = cast(SelfModifying, block.memory)
    return BlockWeights(
        name, rule.w_in, rule.w_out, block.cms.up[0], block.cms.down[0], block.norm_memory, block.norm_cms, rule.norm,
        rule.conv, rule.base, rule.rates, rule.gate_bias,
    )  # fmt: skip
