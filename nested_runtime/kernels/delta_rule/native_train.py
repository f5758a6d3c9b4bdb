"""`chunk_scan` on the CPU in C++: see `native/scan.h`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import byref, c_void_p
from dataclasses import replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.kernels.native.abi import Scan, address, load, rule_of

__all__ = ["chunk_scan"]

INPUTS = ("xq", "xk", "xv", "eta", "alpha")


def _run(direction: str, options: RuleOptions, tensors: Mapping[str, torch.Tensor]) -> None:
    """`direction`: "forward" or "backward"; tensors by their names in the structure, contiguous."""
    xq = tensors["xq"]
    batch, length, heads, dim = xq.shape
    library = load(xq.dtype, "train")
    rule = rule_of(dim, replace(options, chunk=min(options.chunk, max(length, 1))))  # scratch grows with the chunk
    threads = min(torch.get_num_threads(), heads)
    scratch = xq.new_empty(threads * library.scan_scratch(byref(rule)))
    pointers = {name: address(tensor) for name, tensor in tensors.items()}
    scan = Scan(**pointers, sequences=batch, tokens=length, heads=heads)
    getattr(library, f"scan_{direction}")(byref(rule), byref(scan), c_void_p(address(scratch)), threads)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *tensors, options = args
        *inputs, base, rates, state = (t.detach().contiguous() for t in tensors)
        given = dict(zip(INPUTS, inputs, strict=True)) | {"base": base, "rates": rates}
        made = {"state": state.clone(), "out": torch.empty_like(inputs[0])}
        if any(ctx.needs_input_grad):
            batch, length, heads, _ = inputs[0].shape
            chunks = -(-length // options.chunk)
            made["anchors"] = state.new_empty(batch, heads, chunks, *state.shape[2:])
            ctx.save_for_backward(*given.values(), made["anchors"])
            ctx.options = options
        _run("forward", options, given | made)
        return made["out"], made["state"]

    @staticmethod
    @once_differentiable  # a second derivative must fail, not be wrong
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        *given, anchors = ctx.saved_tensors
        tensors = dict(zip((*INPUTS, "base", "rates"), given, strict=True))
        found = {f"d_{name}": torch.empty_like(tensor) for name, tensor in tensors.items()}
        d_out, d_state = grads[0].contiguous(), grads[1].clone(memory_format=torch.contiguous_format)
        _run("backward", ctx.options, tensors | found | {"anchors": anchors, "d_out": d_out, "state": d_state})
        *d_inputs, d_base, d_rates = found.values()
        is_shifted = ctx.options.retain == "zero"  # the start is in the state then
        return *d_inputs, None if is_shifted else d_base, d_rates, d_state, None


def _check(tensors: Sequence[torch.Tensor]) -> None:
    """ValueError for what C++ would read beyond its end."""
    xq = tensors[0]
    batch, length, heads, dim = xq.shape
    rows = 3 * dim + 2
    shapes = [
        *[xq.shape] * 3,
        *[(batch, length, heads)] * 2,
        (heads, rows, dim),
        (heads, rows),
        (batch, heads, rows, dim),
    ]
    for name, tensor, shape in zip((*INPUTS, "base", "rates", "state"), tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != xq.dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; beside xq, {tuple(xq.shape)} of {xq.dtype}, "
                f"it must be {tuple(shape)} of the same type"
            )


def chunk_scan(*tensors: torch.Tensor, options: RuleOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """See `chunk.chunk_scan`: same tensors in its order, of one type; heads are shared among torch's threads."""
    _check(tensors)
    out, new = _Scan.apply(*tensors, options)  # type: ignore[no-untyped-call]
    return out, new
