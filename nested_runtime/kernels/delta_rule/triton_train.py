"""`chunk_scan` of float32 and bfloat16 tensors on a GPU: see `triton_chunk.py` and `triton_backward.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from nested_runtime.kernels.delta_rule.layout import ETA_MAX, NORM_EPS, RuleOptions
from nested_runtime.kernels.delta_rule.triton_backward import scan_backward
from nested_runtime.kernels.delta_rule.triton_chunk import scan_forward
from nested_runtime.kernels.triton_math import precision, tile

__all__ = ["chunk_scan"]

SIDE = 16  # of a tile


class _Launch:
    """Sizes and choices that both kernels share."""

    def __init__(self, heads: int, dim: int, options: RuleOptions) -> None:
        rows, places = 3 * dim + 2, tile(options.chunk)
        self.factors = rows * dim + places * (5 * dim + 3 * rows + 2 * places + 4)
        self.extra = places * (2 * rows + 2 * places + 5 * dim + 2 * dim + 2)
        self.lengths = (dim, rows, places)
        self.sizes = {
            "H": heads, "K": dim, "R": rows, "C": options.chunk, "CP": places, "B": SIDE,
            "TOKEN": options.read == "token", "ETA_MAX": ETA_MAX, "EPS": NORM_EPS, "PREC": precision(),
            "num_warps": 8, "num_stages": 1, "maxnreg": 255,
        }  # fmt: skip


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *tensors, options = args
        *inputs, start, rates, state = (t.detach().contiguous() for t in tensors)
        batch, length, heads, dim = inputs[0].shape
        launch = _Launch(heads, dim, options)
        kept = state.new_empty(batch, triton.cdiv(length, options.chunk) + 1, *state.shape[1:])
        kept[:, 0] = state
        out, scratch = torch.empty_like(inputs[0]), state.new_empty(batch, heads, launch.factors)
        scan_forward[batch, heads](
            *inputs, start, rates, kept, out, scratch, length, *launch.lengths, SIZE=launch.factors, **launch.sizes
        )
        ctx.save_for_backward(*inputs, start, rates, kept)
        ctx.launch = launch
        return out, kept[:, -1].clone()

    @staticmethod
    @once_differentiable  # a second derivative must fail, not be wrong
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        *inputs, start, rates, kept = ctx.saved_tensors
        d_out, ds = grads[0].contiguous(), grads[1].clone(memory_format=torch.contiguous_format)
        batch, length, heads, _ = inputs[0].shape
        launch = ctx.launch
        size = launch.factors + launch.extra
        d_start, d_rates = torch.zeros_like(ds), torch.zeros_like(ds[..., 0])
        found, scratch = [torch.empty_like(t) for t in inputs], ds.new_empty(batch, heads, size)
        scan_backward[batch, heads](
            *inputs, start, rates, kept, d_out, ds, d_start, d_rates, *found, scratch, length, *launch.lengths,
            FACTORS=launch.factors, SIZE=size, **launch.sizes,
        )  # fmt: skip
        return *found, d_start.sum(0), d_rates.sum(0), ds, None


def chunk_scan(*tensors: torch.Tensor, options: RuleOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """See `chunk.chunk_scan`: same tensors in its order, results in their dtype; computed in float32."""
    *inputs, base, rates, state = (t.float() for t in tensors)
    start = base if options.retain == "start" else torch.zeros_like(base)
    out, new = _Scan.apply(*inputs, start, rates, state, options)
    return out.to(tensors[0].dtype), new.to(tensors[-1].dtype)
