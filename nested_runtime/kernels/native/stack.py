"""Embeddings, a stack of HOPE blocks and a linear layer as the C++ kernels run them: packed once, scratch kept.

Weights that bfloat16 holds exactly (a shipped checkpoint's) are kept in bfloat16, which halves what a decode step reads
and changes no number; activations, sums and memories are those of the model's type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import byref, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

from nested_runtime.core import Batch
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.kernels.delta_rule.native import expand_rates
from nested_runtime.kernels.native import abi

__all__ = ["BlockWeights", "Linear", "Stack"]

FIELDS = ("anchor", "tail_k", "tail_d", "tail_g", "window")


@dataclass(frozen=True)
class BlockWeights:
    """Parameters of one block: those of `memory/self_modifying.py`, the static MLP `up`, `down`, and the norms.

    name: prefix of its state tensors in the pool
    """

    name: str
    w_in: torch.Tensor
    w_out: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    norm_memory: torch.Tensor
    norm_cms: torch.Tensor
    norm_read: torch.Tensor
    conv: torch.Tensor
    base: torch.Tensor
    rates: torch.Tensor
    gate_bias: torch.Tensor


class Linear:
    """y = W x, packed; a row's result does not depend on the rows beside it. `inputs` must be even."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.library = abi.load(weight.dtype)
        self.outputs, self.inputs = weight.shape
        is_bf16 = weight.dtype == torch.float32 and bool((weight.bfloat16().float() == weight).all())
        size = self.library.packed_size(self.outputs, self.inputs)
        self.panels = torch.empty(size, dtype=torch.bfloat16 if is_bf16 else weight.dtype)
        weight = weight.detach().contiguous()
        self.library.pack_weight(
            c_void_p(abi.address(weight)), self.outputs, self.inputs, is_bf16, c_void_p(abi.address(self.panels))
        )
        self.field = abi.Weight(abi.address(self.panels), is_bf16, self.outputs, self.inputs)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, inputs] -> [N, outputs]."""
        x = x.contiguous()
        out = torch.empty(x.shape[0], self.outputs, dtype=x.dtype)
        self.library.linear(byref(self.field), c_void_p(abi.address(x)), x.shape[0], c_void_p(abi.address(out)))
        return out


class Stack:
    """Blocks of one shape behind their embeddings.

    heads, head_dim, options: of the rule; embed [V, D] and what it is multiplied with; last_norm: weight of the norm
    behind the blocks
    """

    def __init__(
        self, blocks: Sequence[BlockWeights], heads: int, head_dim: int, options: RuleOptions,
        embed: torch.Tensor, scale: float, last_norm: torch.Tensor,
    ) -> None:  # fmt: skip
        first = blocks[0]
        self.library = abi.load(first.w_in.dtype)
        self.names = [f"{block.name}.{field}" for block in blocks for field in FIELDS]
        self._found: list[torch.Tensor] = []  # the pool's tensors that the layers point to
        self._kept: list[Any] = []  # what the structures point to
        rule = abi.rule_of(head_dim, options)
        self._shape = abi.Shape(rule, first.w_in.shape[1], heads, first.conv.shape[0], first.up.shape[0])
        self._layers = (abi.Layer * len(blocks))(*(self._layer(block, head_dim) for block in blocks))
        self._table = abi.Table(self._keep(embed), embed.shape[0], scale)
        self._last_norm = c_void_p(self._keep(last_norm))
        size = self.library.stack_scratch(byref(self._shape))
        self._scratch = torch.empty(size, dtype=first.w_in.dtype)

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return abi.address(tensor)

    def _layer(self, block: BlockWeights, head_dim: int) -> Any:
        weights = [Linear(weight) for weight in (block.w_in, block.w_out, block.up, block.down)]
        self._kept += weights
        norms = (block.norm_memory, block.norm_cms, block.norm_read, block.conv)
        memory = (block.base, expand_rates(block.rates.detach(), head_dim), block.gate_bias)
        return abi.Layer(
            *(weight.field for weight in weights), *map(self._keep, norms), abi.Memory(*map(self._keep, memory))
        )

    def __call__(self, batch: Batch, pool: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The stream behind the blocks [T, D]; the pool is updated in place.

        IndexError: an unknown token; ValueError: sequences of another length than the tokens. Nothing is changed then.
        """
        found = [pool[name] for name in self.names]
        if list(map(id, found)) != list(map(id, self._found)):
            self._found = found
            for place, tensor in enumerate(found):
                layer, field = divmod(place, len(FIELDS))
                setattr(self._layers[layer].memory, FIELDS[field], abi.address(tensor))
        tokens = batch.token_ids.long()
        x = torch.empty(tokens.shape[0], self._shape.dim, dtype=self._scratch.dtype)
        unknown = self.library.stack(
            byref(self._shape), self._layers, len(self._layers), abi.packed(batch), byref(self._table),
            c_void_p(abi.address(tokens)), tokens.shape[0], self._last_norm, c_void_p(abi.address(x)),
            c_void_p(abi.address(self._scratch)),
        )  # fmt: skip
        if unknown == tokens.shape[0]:
            raise ValueError(f"cu_seqlens ends at {int(batch.cu_seqlens[-1])}, but there are {unknown} tokens")
        if unknown >= 0:
            raise IndexError(f"token id {int(tokens[unknown])} is not in 0..{self._table.count - 1}")
        return x
