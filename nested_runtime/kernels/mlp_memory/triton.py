"""Gradients of the MLP memory over a chunk on a GPU: a program is a head of a session; see `reference.py`.

Hidden units go by BF at a time, twice: all of them make the error, then each block makes its rows of the gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nested_runtime.kernels.triton_math import precision, tile

__all__ = ["chunk_gradient"]

HIDDEN = 16  # units of one step


@triton.jit
def _gradient(
    k, v, theta, w1, w2, slots, g1, g2, tokens, hidden, stride_1, stride_2,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, CP: tl.constexpr, BF: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Grid (B, H); hidden = F, not known to the compiler, which else unrolls what then spills."""
    b, h = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + b).to(tl.int64)
    i, c, f = tl.arange(0, CP), tl.arange(0, DP), tl.arange(0, BF)
    token = (b * tokens + i).to(tl.int64) * H + h
    inside = (i < tokens)[:, None] & (c < D)[None, :]
    kt = tl.load(k + token[:, None] * D + c[None, :], mask=inside, other=0.0)
    error = kt - tl.load(v + token[:, None] * D + c[None, :], mask=inside, other=0.0)
    w1 += slot * stride_1 + h * D * F
    w2 += slot * stride_2 + h * F * D
    g1 += (b * H + h).to(tl.int64) * D * F
    g2 += (b * H + h).to(tl.int64) * F * D
    for f0 in range(0, hidden, BF):
        fm = f0 + f < F
        up = tl.load(w2 + (f0 + f)[:, None] * D + c[None, :], mask=fm[:, None] & (c < D)[None, :], other=0.0)
        down = tl.load(w1 + c[:, None] * F + (f0 + f)[None, :], mask=(c < D)[:, None] & fm[None, :], other=0.0)
        a = tl.dot(kt, tl.trans(up), input_precision=PREC)
        act = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
        error = tl.dot(act, tl.trans(down), error, input_precision=PREC)
    error *= tl.load(theta + token, mask=(i < tokens) & (slot > 0), other=0.0)[:, None]
    for f0 in range(0, hidden, BF):
        fm = f0 + f < F
        um, dm = fm[:, None] & (c < D)[None, :], (c < D)[:, None] & fm[None, :]
        up = tl.load(w2 + (f0 + f)[:, None] * D + c[None, :], mask=um, other=0.0)
        down = tl.load(w1 + c[:, None] * F + (f0 + f)[None, :], mask=dm, other=0.0)
        a = tl.dot(kt, tl.trans(up), input_precision=PREC)
        phi = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
        slope = phi + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
        back = tl.dot(error, down, input_precision=PREC) * slope
        first = tl.dot(tl.trans(error), a * phi, input_precision=PREC)
        tl.store(g1 + c[:, None] * F + (f0 + f)[None, :], first, mask=dm)
        second = tl.dot(tl.trans(back), kt, input_precision=PREC)
        tl.store(g2 + (f0 + f)[:, None] * D + c[None, :], second, mask=um)


def chunk_gradient(
    k: torch.Tensor, v: torch.Tensor, theta: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.chunk_gradient`; float32, at most 64 tokens."""
    (batch, tokens, heads, dim), hidden = k.shape, w1.shape[3]
    g1 = torch.empty(batch, heads, dim, hidden, device=k.device)
    g2 = torch.empty(batch, heads, hidden, dim, device=k.device)
    _gradient[batch, heads](
        k.contiguous(), v.contiguous(), theta.contiguous(), w1, w2, slots, g1, g2, tokens, hidden, w1.stride(0),
        w2.stride(0), H=heads, D=dim, DP=tile(dim), F=hidden, CP=tile(tokens), BF=HIDDEN, PREC=precision(),
        num_warps=8, num_stages=1,
    )  # fmt: skip
    return g1, g2
