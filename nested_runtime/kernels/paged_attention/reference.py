"""Paged attention in torch: decodes of all sequences as one padded product, prefills one by one."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from nested_runtime.core import KVRows

__all__ = ["attend", "paged_attention"]


def paged_attention(
    q: torch.Tensor, pool: torch.Tensor, kv: KVRows, cu_seqlens: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """o_t = sum_{t-W < j <= t} softmax_j(scale q_t . k_j) v_j for every token t of a packed batch.

    q      [T, H, K]; H is a multiple of the pool's G, query head h reads key head h // (H / G)
    pool   [rows, 2, G, K] keys and values by pool row, those of the batch's tokens written already
    window W, tokens a token sees at most
    Returns [T, H, K].
    """
    out = torch.empty_like(q)
    bounds, num = cu_seqlens.tolist(), kv.num.tolist()
    single = [b for b in range(len(num)) if bounds[b + 1] - bounds[b] == 1]
    if single:
        rows = [bounds[b] for b in single]
        out[rows] = _decode(q[rows], pool, kv.read[single], kv.num[single], window, scale)
    for b in set(range(len(num))) - set(single):
        begin, end = bounds[b], bounds[b + 1]
        if begin < end:
            first = max(0, num[b] - (end - begin) - window + 1)
            near = kv.read[b, first : num[b]]
            keys, values = pool[near].unbind(1)
            at = torch.arange(len(near), device=q.device)
            last = at[len(near) - (end - begin) :, None]
            mask = (at <= last) & (at > last - window)
            out[begin:end] = attend(q[None, begin:end], keys[None], values[None], mask[None], scale)[0]
    return out


def _decode(
    q: torch.Tensor, pool: torch.Tensor, read: torch.Tensor, num: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """One token per sequence: q [B, H, K], read [B, N], num [B] -> [B, H, K]."""
    longest, shortest = int(num.max()), int(num.min())
    first = max(0, shortest - window)
    keys, values = pool[read[:, first:longest]].unbind(2)
    at = torch.arange(first, longest, device=q.device)
    mask = (at < num[:, None]) & (at >= num[:, None] - window)
    return attend(q[:, None], keys, values, mask[:, None], scale)[:, 0]


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """q [B, T, H, K], keys and values [B, N, G, K], mask [B, T, N] (True = seen) -> [B, T, H, K].

    The H / G query heads of a key head are more rows of queries to it, so keys are never repeated.
    """
    batch, length, heads, dim = q.shape
    shared = keys.shape[2]
    queries = q.view(batch, length, shared, heads // shared, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    seen = mask[:, None, None].expand(-1, 1, heads // shared, -1, -1).flatten(2, 3)
    k, v = keys.to(q.dtype).transpose(1, 2), values.to(q.dtype).transpose(1, 2)
    out = scaled_dot_product_attention(queries, k, v, attn_mask=seen, scale=scale)
    return out.view(batch, shared, heads // shared, length, dim).permute(0, 3, 1, 2, 4).flatten(2, 3)
