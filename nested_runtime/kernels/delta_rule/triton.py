"""The rule on a GPU over a packed batch, on the factored state in place in the pool: a decode and a prefill kernel.

Which kernel reads a sequence depends on its own number of new tokens alone (one: decode), so companions in the batch
change nothing. Nothing here waits for the device: the kernels read lengths, slots and positions themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nested_runtime.core import Batch
from nested_runtime.kernels.delta_rule.layout import ETA_MAX, NORM_EPS, RuleOptions
from nested_runtime.kernels.delta_rule.triton_decode import decode
from nested_runtime.kernels.delta_rule.triton_prefill import prefill
from nested_runtime.kernels.triton_math import precision, tile, warps

__all__ = ["packed_scan"]


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
    sizes = {"H": heads, "K": dim, "KP": tile(dim), "C": chunk, "CP": tile(chunk)}
    choices = {"TOKEN": options.read == "token", "WHOLE": options.retain == "zero", "ETA_MAX": ETA_MAX, "EPS": NORM_EPS}
    grid, sequences = (len(batch.slots), heads), len(batch.slots)
    few = mixed.shape[0] <= sequences  # decode steps, and no kernel launched in vain for them
    decode[grid](
        *tensors, *state, *where, out, *strides, **sizes, **choices, ALL=few, num_warps=warps(dim)
    )  # fmt: skip
    if not few:
        scratch = torch.empty(sequences, heads, 2, tile(chunk), dim, dtype=mixed.dtype, device=mixed.device)
        prefill[grid](
            *tensors, *state, *where, out, scratch, *strides, **sizes, **choices, BR=min(tile(dim), 64),
            PREC=precision(mixed.device), num_warps=4 if tile(dim) < 128 else 8, num_stages=1,
        )  # fmt: skip
    return out
