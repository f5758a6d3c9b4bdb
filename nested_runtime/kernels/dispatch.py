"""Which kernels serve a packed batch, chosen once per device and dtype.

`NESTED_KERNELS` = auto (default), reference, native, numba or triton. "reference" is the torch path of `UpdateRule`;
native (C++, where there is a g++) and numba serve CPU tensors, triton CUDA tensors. An implementation is a pair of
modules `short_conv/<name>.py` and `delta_rule/<name>.py` with `packed_conv` and `packed_scan`; native also runs whole
stacks of blocks (`native/stack.py`). What training uses beside it is in `FUNCTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch

from nested_runtime.config import from_environment
from nested_runtime.errors import ConfigError

__all__ = ["KernelConfig", "Kernels", "choose", "function", "packed_kernels"]

DEVICES = {"native": "cpu", "numba": "cpu", "triton": "cuda"}  # the first that works is chosen
BOTH = (torch.float32, torch.float64)
DTYPES = {"native": BOTH, "numba": BOTH, "triton": (torch.float32,)}
# Beside the pair, by device: a differentiable scan of whole chunks, low-rank deltas of many sessions in slots.
FUNCTIONS: dict[str, dict[str, tuple[str, str, tuple[torch.dtype, ...]]]] = {
    "chunk_scan": {
        "cpu": ("native", "delta_rule.native_train", BOTH),
        "cuda": ("triton", "delta_rule.triton_train", (torch.float32, torch.bfloat16)),
    },
    "low_rank_apply": {"cuda": ("triton", "levels.triton", (torch.float32,))},
}


@dataclass(frozen=True)
class KernelConfig:
    """kernels: "auto", "reference", "native", "numba" or "triton"."""

    kernels: str = "auto"

    def __post_init__(self) -> None:
        known = ("auto", "reference", *DEVICES)
        if self.kernels not in known:
            raise ConfigError(f"NESTED_KERNELS is {self.kernels!r}; give one of {', '.join(known)}")


class Kernels(NamedTuple):
    """One implementation: see `short_conv/numba.py` and `delta_rule/numba.py` for the signatures."""

    name: str
    packed_conv: Callable[..., torch.Tensor]
    packed_scan: Callable[..., torch.Tensor]


def choose(config: KernelConfig, device: str, dtype: torch.dtype) -> Kernels | None:
    """Kernels for tensors of `dtype` on a device type, None for the reference; ConfigError if forced and impossible."""
    if config.kernels == "reference":
        return None
    forced = config.kernels != "auto"
    for name in [config.kernels] if forced else [name for name, of in DEVICES.items() if of == device]:
        try:
            _require_support(name, device, dtype)
            return _load(name, dtype)
        except (ImportError, ConfigError) as error:
            if forced:
                remedy = "unset it for the best that works here, or set it to reference"
                raise ConfigError(f"NESTED_KERNELS={name} cannot be used: {error}; {remedy}") from error
    return None


@cache
def packed_kernels(device: str, dtype: torch.dtype) -> Kernels | None:
    """`choose` with the process's environment, which is read once per device and dtype."""
    return choose(KernelConfig(**from_environment(KernelConfig)), device, dtype)


@cache
def function(name: str, device: str, dtype: torch.dtype) -> Callable[..., Any] | None:
    """The function of `FUNCTIONS` by that name where kernels serve such tensors; None for what torch does.

    ConfigError where NESTED_KERNELS names those kernels and tensors they could serve cannot have them.
    """
    kernels, module, dtypes = FUNCTIONS[name].get(device, ("", "", ()))
    wanted = KernelConfig(**from_environment(KernelConfig)).kernels
    if dtype not in dtypes or wanted not in ("auto", kernels):
        return None
    try:
        if kernels == "native":
            import_module("nested_runtime.kernels.native.abi").load(dtype, "train")
        found: Callable[..., Any] = getattr(import_module(f"nested_runtime.kernels.{module}"), name)
    except ImportError as error:
        if wanted == kernels:
            raise ConfigError(f"NESTED_KERNELS={kernels} cannot be used: {error}; unset it") from error
        return None
    return found


def _require_support(name: str, device: str, dtype: torch.dtype) -> None:
    if DEVICES.get(name) != device:
        raise ConfigError(f"the tensors are on {device!r}")
    if dtype not in DTYPES[name]:
        raise ConfigError(f"memories of {dtype} are not supported, only {' and '.join(map(str, DTYPES[name]))}")


def _load(name: str, dtype: torch.dtype) -> Kernels:
    package = "nested_runtime.kernels"
    if name == "native":
        import_module(f"{package}.native.abi").load(dtype)
    conv, rule = (import_module(f"{package}.{op}.{name}") for op in ("short_conv", "delta_rule"))
    return Kernels(name, conv.packed_conv, rule.packed_scan)
