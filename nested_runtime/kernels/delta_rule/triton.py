"""The rule on a GPU over a packed batch, on the factored state in place in the pool: a decode and a prefill kernel.

Which kernel reads a sequence depends on its own number of new tokens alone (one: decode), so companions in the batch
change nothing. Nothing here waits for the device: the kernels read lengths, slots and positions themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nested_runtime.core import Batch
from nested_runtime.kernels.delta_rule.layout import ETA_MAX, NORM_EPS, RuleOptions
from nested_runtime.kernels.delta_rule.triton_decode import decode, fold
from nested_runtime.kernels.delta_rule.triton_prefill import prefill
from nested_runtime.kernels.triton_math import precision, tile, warps

__all__ = ["packed_scan"]

SIDE = 32  # rows of the state in a product: more needs more registers than there are


def packed_scan(
    mixed: torch.Tensor,
    logits: torch.Tensor,
    base: torch.Tensor,
    rates: torch.Tensor,
    pool: Mapping[str, torch.Tensor],
    batch: Batch,
    options: RuleOptions,
) -> torch.Tensor:
    """See `numba.packed_scan`: same arguments, result and effect; float32 only.

    Pool tensors may have any stride between slots; within a slot they are contiguous.
    """
    heads, dim, chunk = mixed.shape[2], mixed.shape[3], options.chunk
    out = torch.empty(mixed.shape[0], heads, dim, dtype=mixed.dtype, device=mixed.device)
    names = ("anchor", "tail_k", "tail_d", "tail_g")
    tensors = (mixed.contiguous(), logits.contiguous(), base.detach().contiguous(), rates.detach().contiguous())
    state = [pool[name] for name in names]
    where = (batch.slots, batch.positions, batch.cu_seqlens)
    strides = [tensor.stride(0) for tensor in state]
    sizes = {"H": heads, "K": dim, "C": chunk, "CP": tile(chunk)}
    choices = {"TOKEN": options.read == "token", "WHOLE": options.retain == "zero", "ETA_MAX": ETA_MAX, "EPS": NORM_EPS}
    grid, whole, prec = (len(batch.slots), heads), choices["WHOLE"], precision()
    side, wide = min(tile(dim), SIDE), tile(dim)
    decode[grid](
        *tensors, *state, *where, out, *strides, **sizes, **choices, KP=wide, BR=min(wide, 64), num_warps=warps(dim)
    )
    fold[grid](tensors[2], *state, *where, *strides, **sizes, KP=wide, BR=side, WHOLE=whole, PREC=prec, num_stages=1)
    if batch.longest != 1:
        scratch = torch.empty(*grid, tile(chunk) * (3 * dim + 2 * tile(chunk)), dtype=mixed.dtype, device=mixed.device)
        prefill[grid](
            *tensors, *state, *where, out, scratch, *strides, dim, **sizes, **choices, PREC=prec,
            BR=16, BC=16, num_warps=8, num_stages=1,
        )  # fmt: skip
    return out
