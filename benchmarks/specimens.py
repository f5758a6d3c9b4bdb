"""Launches of every Triton kernel at the shapes that are served, on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from nested_runtime.core import Batch
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.kernels.delta_rule.triton import packed_scan
from nested_runtime.kernels.delta_rule.triton_train import chunk_scan
from nested_runtime.kernels.gated_delta.triton import TRAIN_CHUNK, TRAIN_ROWS, packed_gated_delta
from nested_runtime.kernels.gated_delta.triton_backward import backward
from nested_runtime.kernels.levels.triton import low_rank_apply, outer_step, step
from nested_runtime.kernels.mlp_memory.triton import chunk_gradient
from nested_runtime.kernels.short_conv.triton import packed_conv
from nested_runtime.kernels.slots.triton import pack_int8, unpack_int8

__all__ = ["SPECIMENS"]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def batch(sequences: int, tokens: int) -> Batch:
    ids, positions = (empty(n, dtype=torch.int64) for n in (tokens, sequences))
    bounds, slots = (empty(n, dtype=torch.int32) for n in (sequences + 1, sequences))
    return Batch(ids, bounds, slots, positions, longest=tokens // sequences)


def delta_rule(dim: int, tokens: int, read: str = "token", retain: str = "start") -> None:
    h, c, r = 16, 32, 3 * dim + 2
    pool = {"anchor": empty(65, h, r, dim), "tail_k": empty(65, h, c, dim), "tail_d": empty(65, h, c, r),
            "tail_g": empty(65, h, c)}  # fmt: skip
    inputs = empty(tokens, 3, h, dim), empty(tokens, 2, h), empty(h, r, dim), empty(h, 4)
    packed_scan(*inputs, pool, batch(64, tokens), RuleOptions(c, read, retain))


def delta_rule_training(dim: int) -> None:
    h, r = 16, 3 * dim + 2
    wide, gate = (empty(8, 512, h, *of).requires_grad_() for of in ((dim,), ()))
    out, state = chunk_scan(
        wide, wide, wide, gate, gate, empty(h, r, dim), empty(h, r), empty(8, h, r, dim), options=RuleOptions()
    )
    torch.autograd.backward([out, state], [torch.empty_like(out), torch.empty_like(state)])


def plain_rule(dim: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
    wide, gate = empty(tokens, 16, dim, dtype=dtype), empty(tokens, 16)
    where = batch(64, tokens)
    packed_gated_delta(
        wide, wide, wide, gate, gate, empty(65, 16, dim, dim), where.slots, where.cu_seqlens, longest=where.longest
    )


def plain_training(dim: int) -> None:
    wide, gate, chunks = empty(4096, 16, dim, dtype=torch.bfloat16), empty(4096, 16), 4096 // TRAIN_CHUNK + 8
    inverses, decays, kept = (empty(chunks, 16, *s) for s in ((TRAIN_CHUNK, TRAIN_CHUNK), (TRAIN_CHUNK,), (dim, dim)))
    state = empty(8, 16, dim, dim)
    bounds = empty(9, dtype=torch.int32)
    backward(wide, wide, wide, gate, gate, inverses, decays, kept, bounds, empty(4096, 16, dim), state, TRAIN_ROWS)


def short_conv() -> None:
    packed_conv(empty(512, 3072), empty(65, 3, 3072), empty(4, 3072), batch(64, 512))


def slots() -> None:
    pool, where = empty(65, 16, 194, 64), empty(64, dtype=torch.int32)
    unpack_int8(*pack_int8(pool, where), pool, where)


def levels() -> None:
    where, rate = batch(64, 512), empty(64)
    inner, outer = empty(65, 16, 1024), empty(65, 4096, 16)
    for dtype in (torch.float32, torch.bfloat16):
        x, y, start = (empty(*shape, dtype=dtype) for shape in ((512, 1024), (512, 4096), (16, 1024)))
        low_rank_apply(x, y, start, inner, outer, where.slots, where.cu_seqlens)
    dense, momentum = empty(17, 4096, 1024), empty(17, 4096, 1024)
    step(dense, empty(64, 4096, 1024), where.slots, rate, momentum, 0.9, rate)
    outer_step(dense, *(empty(64, 512, n, dtype=torch.bfloat16) for n in (4096, 1024)), where.slots, rate)


def mlp_memory() -> None:
    wide = empty(64, 32, 16, 64)
    chunk_gradient(
        wide, wide, empty(64, 32, 16), empty(65, 16, 64, 256), empty(65, 16, 256, 64), empty(64, dtype=torch.int32)
    )


SPECIMENS: dict[str, Callable[[], None]] = {
    "delta_rule decode 64": partial(delta_rule, 64, 64),
    "delta_rule decode 128": partial(delta_rule, 128, 64),
    "delta_rule prefill 64": partial(delta_rule, 64, 512),
    "delta_rule prefill 128": partial(delta_rule, 128, 512),
    "delta_rule training 64": partial(delta_rule_training, 64),
    "delta_rule training 128": partial(delta_rule_training, 128),
    "short_conv": short_conv,
    "gated_delta decode 128": partial(plain_rule, 128, 64),
    "gated_delta prefill 64": partial(plain_rule, 64, 512),
    "gated_delta prefill 64 float32": partial(plain_rule, 64, 512, torch.float32),
    "gated_delta prefill 128": partial(plain_rule, 128, 512),
    "slots": slots,
    "levels": levels,
    "mlp_memory": mlp_memory,
    "gated_delta backward 64": partial(plain_training, 64),
}
