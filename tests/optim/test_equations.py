"""Each optimizer against its own equations, written another way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.errors import ConfigError
from nested_runtime.optim.base import InnerRule, build_rule
from nested_runtime.optim.matrices import _by_rows, newton_schulz

EXAMPLES = settings(max_examples=15, deadline=None)
EXACT = {"rtol": 1e-9, "atol": 1e-11}
NORMS = st.sampled_from([1e-3, 0.3, 1.0, 7.0, 1e3])


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dgd(w: torch.Tensor, d: torch.Tensor, x: torch.Tensor, lr: float) -> torch.Tensor:
    """One DGD step of W [out, in] with surprises d [N, out] and inputs x [N, in]."""
    return build_rule("dgd").step(w[None], (d.T @ x)[None], {}, lr, x[None])[0][0]


@EXAMPLES
@given(st.integers(0, 2**20), NORMS, st.sampled_from([1e-3, 0.1, 1.0, 20.0]))
def test_dgd_of_one_token_is_the_closed_form(seed: int, norm: float, lr: float) -> None:
    w, d = draw(seed, 3, 5), draw(seed + 1, 1, 3)
    x = draw(seed + 2, 1, 5)
    x = x * norm / x.norm()
    e = lr / (1 + lr * norm**2)
    expected = w @ (torch.eye(5, dtype=torch.float64) - e * x.T @ x) - e * d.T @ x
    torch.testing.assert_close(dgd(w, d, x, lr), expected, rtol=1e-7, atol=1e-9)


@EXAMPLES
@given(st.integers(0, 2**20), st.integers(1, 9), NORMS, st.sampled_from([1e-3, 0.1, 1.0]))
def test_dgd_minimises_its_objective(seed: int, tokens: int, norm: float, lr: float) -> None:
    """sum_n 1/2 ||W x_n + d_n||^2 + 1/(2 lr) ||W - W_t||^2, solved as one least-squares system by QR."""
    w, d, x = draw(seed, 3, 5), draw(seed + 1, tokens, 3), draw(seed + 2, tokens, 5) * norm
    rows = torch.cat([x, torch.eye(5, dtype=torch.float64) / math.sqrt(lr)])
    wanted = torch.cat([-d, w.T / math.sqrt(lr)])
    expected = torch.linalg.lstsq(rows, wanted, driver="gelsy").solution.T
    torch.testing.assert_close(dgd(w, d, x, lr), expected, rtol=1e-6, atol=1e-8)


def test_dgd_with_the_papers_rate_holds_for_unit_inputs_only() -> None:
    """Why e is not lr / (1 + lr): with ||x|| = 3 the paper's rate overshoots the memory along x."""
    w, d, x = draw(0, 3, 5), torch.zeros(1, 3, dtype=torch.float64), draw(1, 1, 5)
    for norm, holds in ((1.0, True), (3.0, False)):
        unit = x * norm / x.norm()
        printed = w @ (torch.eye(5, dtype=torch.float64) - 0.5 * unit.T @ unit)
        assert torch.allclose(dgd(w, d, unit, 1.0), printed) == holds


def test_dgd_rows_of_zeros_are_tokens_that_do_not_count() -> None:
    w, d, x = draw(0, 3, 5), draw(1, 2, 3), draw(2, 2, 5)
    padded = torch.cat([x, torch.zeros(6, 5, dtype=torch.float64)])
    torch.testing.assert_close(dgd(w, torch.cat([d, draw(3, 6, 3)]), padded, 0.3), dgd(w, d, x, 0.3), **EXACT)


@EXAMPLES
@given(st.integers(0, 2**20), st.sampled_from([(0.9, 0.999, 1e-8), (0.5, 0.9, 1e-3), (0.0, 0.0, 1e-8)]))
def test_adam_is_torch_adam(seed: int, options: tuple[float, float, float]) -> None:
    theirs = torch.nn.Parameter(draw(seed, 4, 3))
    ours = theirs.detach().clone()[None]
    optimizer = torch.optim.Adam([theirs], lr=0.1, betas=options[:2], eps=options[2])
    rule = build_rule("adam", dict(zip(("beta1", "beta2", "eps"), options, strict=True)))
    state = rule.init(ours)
    for i in range(6):
        theirs.grad = draw(seed + i, 4, 3) * 10.0 ** (i % 3)
        ours, state = rule.step(ours, theirs.grad[None], state, 0.1)
        optimizer.step()
        torch.testing.assert_close(ours[0], theirs.detach(), rtol=1e-10, atol=1e-12)


def test_adams_moments_are_discounted_regressions() -> None:
    """NL App. B: the corrected moments are the weighted least-squares fits of g and g^2."""
    rule, grads = build_rule("adam", {"beta1": 0.7, "beta2": 0.9}), draw(0, 7, 1, 5)
    state = rule.init(grads[0])
    for grad in grads:
        _, state = rule.step(grads[0], grad, state, 0.1)
    for name, beta, values in (("first", 0.7, grads), ("second", 0.9, grads.square())):
        root = torch.tensor([beta ** (6 - i) for i in range(7)], dtype=torch.float64).sqrt()[:, None]
        fit = torch.linalg.lstsq(root, root * values[:, 0]).solution[0]
        torch.testing.assert_close(state[name][0] / (1 - beta**7), fit, **EXACT)


@pytest.mark.parametrize("steps", [1, 5, 6, 12])
@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("autocast", [False, True])
def test_newton_schulz_of_long_rows_is_nearly_as_exact(steps: int, rank: int, autocast: bool) -> None:
    """Where rows are long it iterates on the Gram matrix, whose rounding must not grow more than that of the rows."""
    g = torch.Generator().manual_seed(rank)
    m = torch.randn(2, 32, rank, generator=g) @ torch.randn(2, rank, 128, generator=g)
    expected, rows = (_by_rows(t / t.flatten(1).norm(dim=1)[:, None, None], steps) for t in (m.double(), m))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = newton_schulz(m, steps)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 4 * (rows - expected).norm() + 1e-4 * expected.norm()


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_newton_schulz_orthogonalises(shape: tuple[int, int]) -> None:
    m = draw(0, 2, *shape)
    found = newton_schulz(m, 6)
    values = torch.linalg.svdvals(found)
    assert ((values > 0.6) & (values < 1.3)).all()
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    assert torch.cosine_similarity((u @ vh).flatten(1), found.flatten(1)).min() > 0.97
    assert not newton_schulz(torch.zeros(1, *shape)).any()


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (12, 3)])
def test_muon_is_torch_muon(shape: tuple[int, int]) -> None:
    """torch's Newton-Schulz runs in bfloat16: equal to its rounding."""
    theirs = torch.nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon([theirs], lr=1.0, momentum=0.9, weight_decay=0.0, nesterov=True)
    rule = build_rule("muon", {"momentum": 0.9})
    ours = torch.zeros(1, *shape)
    state = rule.init(ours)
    for i in range(4):
        theirs.grad = draw(i, *shape).float()
        ours, state = rule.step(ours, theirs.grad[None], state, 1.0)
        optimizer.step()
    assert (ours[0] - theirs.detach()).norm() < 0.03 * ours.norm()


def m3_reference(grads: torch.Tensor, lr: float, rule: InnerRule, paper: bool) -> torch.Tensor:
    """NL Algorithm 1 line by line, as two nested loops, for a matrix that starts at zero."""
    r = vars(rule)
    theta = m1 = m2 = v = torch.zeros_like(grads[0])
    b1, b2, b3, f = r["beta1"], r["beta2"], r["beta3"], r["every"]
    for k in range(math.ceil(len(grads) / f)):
        if k > 0:
            total = grads[(k - 1) * f : k * f].sum(0)
            m2 = m2 + b3 * total if paper else b3 * m2 + (1 - b3) * total
        o2 = newton_schulz(m2[None], r["steps"])[0]
        for t in range(k * f, min((k + 1) * f, len(grads))):
            g = grads[t]
            m1 = m1 + b1 * g if paper else b1 * m1 + (1 - b1) * g
            v = v + b2 * g**2 if paper else b2 * v + (1 - b2) * g**2
            o1 = newton_schulz(m1[None], r["steps"])[0]
            vhat = v if paper else v / (1 - b2 ** (t + 1))
            update = (o1 + r["slow"] * o2) / torch.sqrt(vhat + r["eps"])
            theta = theta - lr * (update if paper else r["rms"] * update / update.square().mean().sqrt())
    return theta


@pytest.mark.parametrize("mode", ["ema", "paper"])
@pytest.mark.parametrize("steps", [1, 3, 4, 11])
def test_m3_is_algorithm_1(mode: str, steps: int) -> None:
    rule = build_rule("m3", {"mode": mode, "every": 3, "beta1": 0.8, "beta2": 0.9, "beta3": 0.7})
    grads = draw(1, steps, 4, 6)
    param = torch.zeros(1, 4, 6, dtype=torch.float64)
    state = rule.init(param)
    for grad in grads:
        param, state = rule.step(param, grad[None], state, 0.1)
    torch.testing.assert_close(param[0], m3_reference(grads, 0.1, rule, mode == "paper"), rtol=1e-8, atol=1e-10)


def test_m3_in_the_papers_mode_does_not_see_its_momentum_factors() -> None:
    """Newton-Schulz cancels beta1 and beta3: the reason for the ema mode (docs/log.md)."""
    ends = []
    for beta in (0.1, 0.9):
        rule = build_rule("m3", {"mode": "paper", "every": 2, "beta1": beta, "beta3": beta})
        param = torch.zeros(1, 4, 6, dtype=torch.float64)
        state = rule.init(param)
        for i in range(6):
            param, state = rule.step(param, draw(i, 1, 4, 6), state, 0.1)
        ends.append(param)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)


def test_delta_momentum_erases_along_the_gradient_and_keeps_the_rest() -> None:
    rule = build_rule("delta-momentum", {"momentum": 0.9, "erase": 0.4})
    param, grad = draw(0, 1, 3, 5), torch.zeros(1, 3, 5, dtype=torch.float64)
    grad[0, 1, 2] = 4.0
    m = draw(1, 1, 3, 5)
    _, state = rule.step(param, grad, {"momentum": m}, 0.1)
    expected = 0.9 * m - 0.1 * grad
    expected[..., 2] -= 0.4 * m[..., 2]
    torch.testing.assert_close(state["momentum"], expected, **EXACT)


def test_delta_momentum_without_erasing_is_momentum() -> None:
    param, plain = draw(0, 2, 3, 5), build_rule("momentum")
    rule = build_rule("delta-momentum", {"erase": 0.0})
    a, b = rule.init(param), plain.init(param)
    x = y = param
    for i in range(4):
        grad = draw(i, 2, 3, 5)
        (x, a), (y, b) = rule.step(x, grad, a, 0.1), plain.step(y, grad, b, 0.1)
    torch.testing.assert_close(x, y, **EXACT)


def test_deep_momentum_steps_its_mlp_along_autograds_gradient() -> None:
    rule = build_rule("deep-momentum", {"momentum": 0.8, "inner_lr": 0.3, "hidden": 7})
    param, grad = draw(0, 1, 4, 5), draw(1, 1, 4, 5)
    state = {"w1": draw(2, 1, 5, 7), "w2": draw(3, 1, 7, 5)}
    w1, w2 = (t[0].clone().requires_grad_() for t in state.values())
    start = torch.cat([c := _cosine_basis(5), -c])[:7]
    u = grad[0] / grad[0].square().sum(1).mean().sqrt()

    def memory(u: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return 0.2 * u + torch.nn.functional.gelu(u @ (start + w2).T) @ w1.T

    torch.autograd.backward(0.5 * (memory(u, w1, w2) - u).square().sum(1).mean())
    new, after = rule.step(param, grad, state, 0.1)
    with torch.no_grad():
        w1, w2 = 0.8 * w1 - 0.3 * w1.grad, 0.8 * w2 - 0.3 * w2.grad
        torch.testing.assert_close(after["w1"][0], w1, **EXACT)
        torch.testing.assert_close(after["w2"][0], w2, **EXACT)
        scale = grad[0].square().sum(1).mean().sqrt()
        torch.testing.assert_close(new[0], param[0] - 0.1 * scale * memory(u, w1, w2), **EXACT)


def _cosine_basis(n: int) -> torch.Tensor:
    rows = [[math.cos(math.pi * (c + 0.5) * r / n) for c in range(n)] for r in range(n)]
    basis = torch.tensor(rows, dtype=torch.float64)
    return basis / basis.norm(dim=1, keepdim=True)


def test_deep_momentum_passes_what_comes_again_and_damps_what_is_new() -> None:
    rule = build_rule("deep-momentum", {"momentum": 0.95})
    param = torch.zeros(1, 4, 6, dtype=torch.float64)
    common, state = draw(0, 1, 4, 6), rule.init(param)
    for _ in range(60):
        _, state = rule.step(param, common, state, 1.0)

    def gain(grad: torch.Tensor) -> float:
        moved = -rule.step(param, grad, state, 1.0)[0]
        return float((moved * grad).sum() / grad.square().sum())

    new = torch.linalg.qr(torch.cat([common[0], draw(1, 2, 6)]).T)[0].T[4:]
    assert gain(common) > 0.5
    assert gain(torch.cat([new, new])[None]) < 0.5 * gain(common)


def converge(rule: InnerRule, rates: list[float], steps: int) -> float:
    """Fewest steps to loss 1e-6 on the toy of NL Eq. 53, r^2 + k (r - th + a sin(w r))^2, over learning rates.

    Every learning rate is a session; k = 20, a = 1, w = 2; start (-3.5, 2).
    """
    k, a, w = 20.0, 1.0, 2.0
    lr = torch.tensor(rates, dtype=torch.float64)
    p = torch.tensor([[-3.5, 2.0]], dtype=torch.float64).repeat(len(rates), 1)
    state = rule.init(p)
    for i in range(steps):
        r, theta = p.unbind(1)
        u = r - theta + a * torch.sin(w * r)
        if (r**2 + k * u**2).nan_to_num(torch.inf).min() < 1e-6:
            return i
        grad = torch.stack([2 * r + 2 * k * u * (1 + a * w * torch.cos(w * r)), -2 * k * u], dim=1)
        p, state = rule.step(p, grad, state, lr)
    return math.inf


def test_delta_momentum_converges_faster_than_momentum_on_the_toy() -> None:
    """Both at the best of the same learning rates and their own best coefficients."""
    rates = [10 ** (-x / 8) for x in range(8, 36)]
    plain = min(converge(build_rule("momentum", {"momentum": m}), rates, 800) for m in (0.5, 0.8, 0.9, 0.95, 0.98))
    delta = min(converge(build_rule("delta-momentum", {"momentum": m, "erase": 0.8}), rates, 800) for m in (0.9, 0.98))
    assert delta < 0.7 * plain, f"delta momentum {delta} steps, momentum {plain}"


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("m3", "mode", "fast"), ("m3", "every", 0), ("m3", "steps", True), ("muon", "steps", 2.0),
        ("adam", "eps", 0.0), ("deep-momentum", "hidden", 0), ("delta-momentum", "erase", 1.5),
    ],
)  # fmt: skip
def test_impossible_options_are_named(name: str, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"'{option}' must be"):
        build_rule(name, {option: value})
