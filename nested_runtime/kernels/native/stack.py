"""Embeddings, a stack of HOPE blocks and a linear layer as the C++ kernels run them: packed once, scratch kept.

Weights that bfloat16 holds exactly (a shipped checkpoint's) are kept in bfloat16, which halves what a decode step reads
and changes no number; activations, sums and memories are those of the model's type. On request products are int8.
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

MOST_INPUTS = 1 << 16  # whose int8 products a sum in int32 holds
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
    """y = W x, packed; a row's result does not depend on the rows beside it. `inputs` must be even.

    int8: weights in units of their output's largest / 127 and activations in units of their row's, both rounded; sums
    are exact. float32 only.
    """

    def __init__(self, weight: torch.Tensor, int8: bool = False) -> None:
        self.library = abi.load(weight.dtype)
        self.outputs, self.inputs = weight.shape
        if int8 and (weight.dtype != torch.float32 or self.inputs > MOST_INPUTS):
            raise ValueError(
                f"weights {tuple(weight.shape)} of {weight.dtype} cannot be served in int8: make the model float32, "
                f"with at most {MOST_INPUTS} inputs"
            )
        weight = weight.detach().contiguous()
        self._kept = [weight]  # what the structure points to, and the source: no other tensor gets its address
        self.field = self._int8(weight) if int8 else self._floats(weight)

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return abi.address(tensor)

    def _floats(self, weight: torch.Tensor) -> Any:
        is_bf16 = _fits_bf16(weight)
        size = self.library.packed_size(self.outputs, self.inputs)
        panels = self._keep(torch.empty(size, dtype=torch.bfloat16 if is_bf16 else weight.dtype))
        self.library.pack_weight(c_void_p(abi.address(weight)), self.outputs, self.inputs, is_bf16, c_void_p(panels))
        return abi.Weight(panels, abi.Form.BF16 if is_bf16 else abi.Form.PLAIN, self.outputs, self.inputs, None, None)

    def _int8(self, weight: torch.Tensor) -> Any:
        padded = self.library.padded_outputs(self.outputs)
        scales = torch.zeros(padded, dtype=torch.float32)
        scales[: self.outputs] = weight.abs().amax(1) / 127
        q = (weight / scales[: self.outputs, None].clamp(min=1e-30)).round().to(torch.int8)
        panels = self._keep(torch.empty(padded, self.library.padded_inputs(self.inputs), dtype=torch.int8))
        shifts = self._keep(torch.empty(padded, dtype=torch.int32))
        self.library.pack_weight_int8(
            c_void_p(abi.address(q)), self.outputs, self.inputs, c_void_p(panels), c_void_p(shifts)
        )
        return abi.Weight(panels, abi.Form.INT8, self.outputs, self.inputs, self._keep(scales), shifts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, inputs] -> [N, outputs]."""
        x = x.contiguous()
        out = torch.empty(x.shape[0], self.outputs, dtype=x.dtype)
        self.library.linear(byref(self.field), c_void_p(abi.address(x)), x.shape[0], c_void_p(out.data_ptr()))
        return out


class Stack:
    """Blocks of one shape behind their embeddings.

    heads, head_dim, options: of the rule; embed [V, D] and what it is multiplied with; last_norm: weight of the norm
    behind the blocks
    """

    def __init__(
        self, blocks: Sequence[BlockWeights], heads: int, head_dim: int, options: RuleOptions,
        embed: torch.Tensor, scale: float, last_norm: torch.Tensor, int8: bool = False,
    ) -> None:  # fmt: skip
        first = blocks[0]
        self.library = abi.load(first.w_in.dtype)
        self.names = [f"{block.name}.{field}" for block in blocks for field in FIELDS]
        self._found: list[torch.Tensor] = []  # the pool's tensors that the layers point to
        self._kept: list[Any] = []  # what the structures point to
        rule = abi.rule_of(head_dim, options)
        self._shape = abi.Shape(rule, first.w_in.shape[1], heads, first.conv.shape[0], first.up.shape[0])
        self._layers = (abi.Layer * len(blocks))(*(self._layer(block, head_dim, int8) for block in blocks))
        self._table = abi.Table(self._keep(embed), embed.shape[0], scale)
        self._last_norm = c_void_p(self._keep(last_norm))
        size = self.library.stack_scratch(byref(self._shape))
        self.dtype = first.w_in.dtype
        self._scratch = c_void_p(self._keep(torch.empty(size, dtype=self.dtype)))

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return abi.address(tensor)

    def _layer(self, block: BlockWeights, head_dim: int, int8: bool) -> Any:
        weights = [Linear(weight, int8) for weight in (block.w_in, block.w_out, block.up, block.down)]
        self._kept += weights
        norms = (block.norm_memory, block.norm_cms, block.norm_read, block.conv)
        pair = self.library.pair()
        is_half = _fits_bf16(block.base) and head_dim % pair == 0
        base = _paired(block.base.bfloat16(), pair) if is_half else block.base
        memory = (base, expand_rates(block.rates.detach(), head_dim), block.gate_bias)
        return abi.Layer(
            *(weight.field for weight in weights),
            *map(self._keep, norms),
            abi.Memory(*map(self._keep, memory), is_half=is_half),
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
        x = torch.empty(tokens.shape[0], self._shape.dim, dtype=self.dtype)
        unknown = self.library.stack(
            byref(self._shape), self._layers, len(self._layers), abi.packed(batch), byref(self._table),
            c_void_p(abi.address(tokens)), tokens.shape[0], self._last_norm, c_void_p(x.data_ptr()), self._scratch,
        )  # fmt: skip
        if unknown == tokens.shape[0]:
            raise ValueError(f"cu_seqlens ends at {int(batch.cu_seqlens[-1])}, but there are {unknown} tokens")
        if unknown >= 0:
            raise IndexError(f"token id {int(tokens[unknown])} is not in 0..{self._table.count - 1}")
        return x


def _paired(rows: torch.Tensor, pair: int) -> torch.Tensor:
    """Rows [.., K] as `Half` has them: the elements i and i + pair / 2 of each `pair` side by side."""
    return rows.reshape(*rows.shape[:-1], -1, 2, pair // 2).transpose(-1, -2)


def _fits_bf16(tensor: torch.Tensor) -> bool:
    """Whether float32 numbers are such that bfloat16 holds them exactly."""
    return tensor.dtype == torch.float32 and bool((tensor.bfloat16().float() == tensor).all())
