"""The C++ structures as ctypes, and how tensors reach them."""

from __future__ import annotations

from ctypes import CDLL, Structure, byref, c_double, c_int32, c_int64, c_size_t, c_void_p
from enum import IntEnum
from functools import cache
from typing import Any

import torch

from nested_runtime.core import Batch
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.kernels.native.compiler import library

__all__ = [
    "Form",
    "Layer",
    "Memory",
    "Packed",
    "Rule",
    "Scan",
    "Shape",
    "Table",
    "Weight",
    "address",
    "load",
    "packed",
    "rule_of",
]

SCALARS = {torch.float32: "float", torch.float64: "double"}


class Form(IntEnum):
    """How a packed weight is kept: the enum of gemm.h."""

    PLAIN = 0
    BF16 = 1
    INT8 = 2


def _structure(name: str, **fields: Any) -> Any:
    return type(name, (Structure,), {"_fields_": list(fields.items())})


Rule = _structure("Rule", dim=c_int32, chunk=c_int32, token=c_int32, whole=c_int32)
Shape = _structure("Shape", rule=Rule, dim=c_int32, heads=c_int32, width=c_int32, hidden=c_int32)
Packed = _structure("Packed", slots=c_void_p, positions=c_void_p, ends=c_void_p, sequences=c_int32)
Table = _structure("Table", rows=c_void_p, count=c_int64, scale=c_double)
Weight = _structure(
    "Weight", data=c_void_p, form=c_int32, outputs=c_int32, inputs=c_int32, scales=c_void_p, shifts=c_void_p
)
Memory = _structure(
    "Memory", base=c_void_p, rates=c_void_p, gate_bias=c_void_p,
    anchor=c_void_p, tail_k=c_void_p, tail_d=c_void_p, tail_g=c_void_p, window=c_void_p, is_half=c_int32,
)  # fmt: skip
Layer = _structure(
    "Layer", w_in=Weight, w_out=Weight, up=Weight, down=Weight,
    norm_memory=c_void_p, norm_cms=c_void_p, norm_read=c_void_p, conv=c_void_p, memory=Memory,
)  # fmt: skip
SCAN = ("xq", "xk", "xv", "eta", "alpha", "base", "rates", "state", "anchors", "out", "d_out", "d_xq", "d_xk", "d_xv",
        "d_eta", "d_alpha", "d_base", "d_rates")  # fmt: skip
Scan = _structure("Scan", **dict.fromkeys(SCAN, c_void_p), sequences=c_int32, tokens=c_int32, heads=c_int32)

RESULTS: dict[str, dict[str, Any]] = {  # that are no int32
    "stack": {"stack": c_int64, "stack_scratch": c_size_t, "rule_scratch": c_size_t, "packed_size": c_size_t},
    "train": {"scan_scratch": c_size_t},
}


@cache
def load(dtype: torch.dtype, source: str = "stack") -> CDLL:
    """The library of `source`, "stack" or "train", for memories of `dtype`; ImportError where there is none."""
    if dtype not in SCALARS:
        raise ImportError(f"the C++ kernels know no memories of {dtype}")
    found = library(source, SCALARS[dtype])
    for name, kind in RESULTS[source].items():
        getattr(found, name).restype = kind
    return found


def address(tensor: torch.Tensor) -> int:
    """Where the elements of a contiguous CPU tensor lie."""
    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is on {tensor.device}, not on the CPU")
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
    return tensor.data_ptr()


def packed(batch: Batch) -> Any:
    """The batch's sequences. Valid while the batch lives."""
    return byref(
        Packed(address(batch.slots), address(batch.positions), address(batch.cu_seqlens), batch.slots.shape[0])
    )


def rule_of(dim: int, options: RuleOptions) -> Any:
    """Shape of a head and its options."""
    return Rule(dim, options.chunk, options.read == "token", options.retain == "zero")
