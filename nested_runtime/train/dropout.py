"""Dropout of what the MLPs add to the stream (Srivastava et al. 2014), while training alone.

MLPs are where sentences of the training set are learned by heart; memories stay whole, because what is dropped from a
copied value is a wrong value.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout

from nested_runtime.memory.cms import ContinuumMemory

__all__ = ["drop_mlps"]


def drop_mlps(model: nn.Module, p: float) -> None:
    """Zero each element of every MLP's output with probability `p` and scale the others by 1 / (1 - p).

    Only in forwards that autograd records: an evaluation is of the whole model.
    """

    def drop(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return dropout(out, p, training=out.requires_grad)

    for module in model.modules():
        if isinstance(module, ContinuumMemory):
            module.register_forward_hook(drop)
