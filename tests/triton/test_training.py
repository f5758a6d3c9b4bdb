"""The stacked rule's training kernels: outputs and all gradients against the float64 autograd of the chunk form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nested_runtime.kernels.delta_rule.chunk import ChunkScan
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.kernels.delta_rule.triton_train import chunk_scan
from nested_runtime.kernels.dispatch import function
from nested_runtime.memory.self_modifying import SelfModifying

Normal = Callable[..., torch.Tensor]
Relative = Callable[[torch.Tensor, torch.Tensor], float]
NAMES = ("xq", "xk", "xv", "eta_logit", "alpha_logit", "base", "rates", "state")
ALPHA = {"usual": 4.0, "keeps all": 30.0, "forgets all": -30.0}


def draw(
    normal: Normal, length: int, dim: int, alpha: str = "usual", batch: int = 1, heads: int = 1
) -> list[torch.Tensor]:
    rows = 3 * dim + 2
    streams = [normal(batch, length, heads, dim) for _ in range(3)]
    gates = [normal(batch, length, heads), normal(batch, length, heads) + ALPHA[alpha]]
    memories = normal(heads, rows, dim), normal(heads, rows), normal(batch, heads, rows, dim)
    return [*streams, *gates, *(0.5 * t for t in memories)]


def check(data: list[torch.Tensor], options: RuleOptions, normal: Normal, relative: Relative) -> None:
    probes = normal(*data[0].shape), normal(*data[-1].shape)
    ours = [t.clone().requires_grad_() for t in data]
    exact = [t.double().cpu().requires_grad_() for t in data]
    found, expected = chunk_scan(*ours, options=options), ChunkScan.apply(*exact, options)
    for results in (found, expected):
        sum((a * p.to(a)).sum() for a, p in zip(results, probes, strict=True)).backward()
    for name, a, b in zip(("out", "new"), found, expected, strict=True):
        assert relative(a.detach(), b.detach()) <= 1e-4, name
    for name, a, b in zip(NAMES, ours, exact, strict=True):
        if name == "base" and options.retain == "zero":
            assert a.grad is None or not a.grad.any()
            continue
        assert relative(a.grad, b.grad) <= 2e-4, name


@pytest.mark.parametrize(("read", "retain"), [("token", "start"), ("anchor", "zero")])
def test_gradients_equal_those_of_the_chunk_form(read: str, retain: str, normal: Normal, relative: Relative) -> None:
    batch = 2 if read == "token" else 1
    check(draw(normal, 6, 5, batch=batch, heads=2), RuleOptions(4, read, retain), normal, relative)


@pytest.mark.parametrize(("chunk", "dim", "length"), [(17, 17, 18), (1, 3, 2)])
def test_other_shapes(chunk: int, dim: int, length: int, normal: Normal, relative: Relative) -> None:
    check(draw(normal, length, dim), RuleOptions(chunk), normal, relative)


@pytest.mark.parametrize("alpha", ["keeps all", "forgets all"])
def test_the_ends_of_retention(alpha: str, normal: Normal, relative: Relative) -> None:
    check(draw(normal, 6, 4, alpha), RuleOptions(4), normal, relative)


def test_near_equal_keys(normal: Normal, relative: Relative) -> None:
    data = draw(normal, 8, 4, "keeps all")
    data[1] = data[1][:, :1] + 1e-6 * data[1]
    check(data, RuleOptions(8), normal, relative)


def test_bfloat16_is_computed_in_float32(normal: Normal) -> None:
    data = [t.bfloat16() for t in draw(normal, 3, 4)]
    out, new = chunk_scan(*data, options=RuleOptions(2))
    expected, state = chunk_scan(*(t.float() for t in data), options=RuleOptions(2))
    assert out.dtype == new.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    assert torch.equal(new, state.bfloat16())


def test_a_second_derivative_fails_instead_of_being_wrong(normal: Normal) -> None:
    data = [t.requires_grad_() for t in draw(normal, 2, 3)]
    out, _ = chunk_scan(*data, options=RuleOptions(2))
    (grad,) = torch.autograd.grad(out.square().sum(), data[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_layer_trains_the_same_with_these_kernels(
    device: torch.device, normal: Normal, relative: Relative, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    module, x = SelfModifying(6, 1, 4, RuleOptions(4)).to(device), normal(1, 7, 6)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    gradients = []
    for scan in (None, chunk_scan):
        monkeypatch.setattr("nested_runtime.kernels.delta_rule.chunk.function", lambda *_, scan=scan: scan)
        state = {s.name: torch.zeros(1, *s.shape, device=device) for s in module.state()}
        out, _ = module.scan(x, state, 0)
        gradients.append(torch.autograd.grad(out.square().sum(), list(module.parameters())))
    for (name, _), expected, found in zip(module.named_parameters(), *gradients, strict=True):
        assert relative(found, expected) <= 1e-3, name


def test_which_tensors_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(device: str, dtype: torch.dtype) -> object:
        return function.__wrapped__("chunk_scan", device, dtype)

    for dtype in (torch.float32, torch.bfloat16):
        assert choose("cuda", dtype) is chunk_scan
    assert choose("cuda", torch.float64) is None
    assert choose("cpu", torch.bfloat16) is None
    monkeypatch.setenv("NESTED_KERNELS", "reference")
    assert choose("cuda", torch.float32) is None
