"""Products with int8 weights in torch, on every device; with float activations, differentiable in them."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

__all__ = ["int8_linear", "int8_product"]


def int8_linear(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """y = x (diag(scale) q)^T: x [.., in], q [out, in] int8, scale [out] -> [.., out], in x's dtype."""
    return linear(x, q.to(x.dtype)) * scale.to(x.dtype)


def int8_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """y = s_x s_w (q_x q_w^T) for x [.., in], w [out, in] float32: what the C++ kernels compute in int8.

    q_w = round(w / s_w) with s_w [out] = max |w| / 127; q_x = floor(x / s_x + 1/2) with s_x [..] = max |x| / 127.
    Sums of integers are exact; to the bit where the machine has a fused multiply and add. No output may be all zeros.
    """
    s_w, largest = w.abs().amax(1) / 127, x.abs().amax(-1, keepdim=True)
    q_w = (w / s_w[:, None]).round()
    q_x = torch.floor((x.double() * (127 / largest).double() + 128.5).float()) - 128
    return (q_x.double() @ q_w.double().T).float() * (largest / 127) * s_w
