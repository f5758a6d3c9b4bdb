"""The rule token by token, from the equations alone. Slow, dtype-preserving, the oracle of every other path.

Source: NL Eq. 83-93 with the decisions of MODEL.md section 6. Per head, for memories m in {k, eta, alpha, v, mem},
base B_m (learned start) and session state X_m, the memory is M_m = B_m + X_m with retain="start"; with retain="zero"
B only initialises X and M_m = X_m. Anchor a = state at the start of the chunk the token falls in.

    k_t = l2norm(M_k,a x^k_t)      v_t = l2norm(M_v,a x^v_t)      q_t = l2norm(x^q_t)
    alpha_t = sigmoid(a_t + M_alpha,a x^k_t)              eta_t = alpha_t / 2 * sigmoid(e_t + M_eta,a x^k_t)
    vhat_m,t = M_m,a v_t  (+ v_t for m = mem, whose learned start is near zero: see docs/log.md)
    X_m,t = X_m,t-1 (alpha_t I - eta_t k_t k_t^T) - eta_t r_m (M_m,a k_t - vhat_m,t) k_t^T         NL Eq. 88
    o_t = M_mem,t q_t   (read="token")   or   M_mem,a q_t   (read="anchor", NL Eq. 90)

v is normalised like k (the paper leaves it free): targets M v feed back into M, and with ||v|| > 2 that loop grows
exponentially from chunk to chunk (docs/log.md).
"""

from __future__ import annotations

import torch

from nested_runtime.kernels.delta_rule.layout import ETA_MAX, NORM_EPS, RuleOptions, rows

__all__ = ["reference_scan"]


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).sum() + NORM_EPS)


def reference_scan(
    xq: torch.Tensor,
    xk: torch.Tensor,
    xv: torch.Tensor,
    eta_logit: torch.Tensor,
    alpha_logit: torch.Tensor,
    base: torch.Tensor,
    rates: torch.Tensor,
    live: torch.Tensor,
    anchor: torch.Tensor,
    position: int,
    options: RuleOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One head of one sequence.

    xq, xk, xv [T, K]; eta_logit, alpha_logit [T]; base [R, K]; rates [R]; live, anchor [R, K]; position: session
    tokens before the first. Returns outputs [T, K], the live state and the anchor after the last token.
    With retain="zero" the caller starts a fresh session from live = anchor = base.
    """
    row = rows(xq.shape[-1])
    start = base if options.retain == "start" else torch.zeros_like(base)
    outputs = []
    for t in range(xq.shape[0]):
        if (position + t) % options.chunk == 0:
            anchor = live
        memory = start + anchor
        k = _unit(memory[row["k"]] @ xk[t])
        v = _unit(memory[row["v"]] @ xv[t])
        q = _unit(xq[t])
        alpha = torch.sigmoid(alpha_logit[t] + memory[row["alpha"]] @ xk[t])
        eta = ETA_MAX * alpha * torch.sigmoid(eta_logit[t] + memory[row["eta"]] @ xk[t])
        target = memory @ v
        target[row["mem"]] = target[row["mem"]] + v
        gradient = rates[:, None] * torch.outer(memory @ k - target, k)
        live = alpha * live - eta * torch.outer(live @ k, k) - eta * gradient
        read = start + (live if options.read == "token" else anchor)
        outputs.append(read[row["mem"]] @ q)
    return torch.stack(outputs), live, anchor
