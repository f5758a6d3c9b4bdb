"""The rule on CPU in C++; see `native/rule.h`."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import byref, c_void_p

import torch

from nested_runtime.core import Batch
from nested_runtime.kernels.delta_rule.layout import RuleOptions, rows
from nested_runtime.kernels.native.abi import Memory, address, load, packed, rule_of

__all__ = ["expand_rates", "packed_scan"]


def expand_rates(rates: torch.Tensor, dim: int) -> torch.Tensor:
    """Rates [H, 4] of the k, eta, alpha and v memories -> r of every row [H, R]; the main memory's is 1."""
    out = rates.new_ones(rates.shape[0], 3 * dim + 2)
    for number, name in enumerate(("k", "eta", "alpha", "v")):
        out[:, rows(dim)[name]] = rates[:, number, None]
    return out


def packed_scan(
    mixed: torch.Tensor,
    logits: torch.Tensor,
    base: torch.Tensor,
    rates: torch.Tensor,
    pool: Mapping[str, torch.Tensor],
    batch: Batch,
    options: RuleOptions,
) -> torch.Tensor:
    """See `delta_rule/numba.py`."""
    heads, dim = mixed.shape[2:]
    library, rule = load(pool["anchor"].dtype), rule_of(dim, options)
    mixed, logits, base = mixed.contiguous(), logits.contiguous(), base.detach().contiguous()
    every, bias = expand_rates(rates.detach(), dim), logits.new_zeros(2, heads)
    out = torch.empty(mixed.shape[0], heads, dim, dtype=mixed.dtype)
    scratch = torch.empty(library.rule_scratch(byref(rule)), dtype=mixed.dtype)
    names = ("anchor", "tail_k", "tail_d", "tail_g")
    memory = Memory(*(address(t) for t in (base, every, bias)), *(address(pool[n]) for n in names))
    pointers = (c_void_p(address(t)) for t in (mixed, logits, out, scratch))
    library.rule(byref(rule), heads, byref(memory), packed(batch), *pointers)
    return out
