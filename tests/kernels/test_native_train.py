"""Training's scan in C++ at sizes of a model: beside torch in float64, in float32, from views, and who gets it.

Equal to the reference and to autograd at small sizes: test_delta_rule.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from nested_runtime.errors import ConfigError
from nested_runtime.kernels.delta_rule import chunk as dispatching
from nested_runtime.kernels.delta_rule import native_train
from nested_runtime.kernels.delta_rule.chunk import ChunkScan
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.kernels.delta_rule.native_train import chunk_scan
from nested_runtime.kernels.dispatch import function
from nested_runtime.memory.self_modifying import SelfModifying

HAS_CPP = function("chunk_scan", "cpu", torch.float64) is not None
pytestmark = pytest.mark.skipif(not HAS_CPP, reason="no g++ to build the C++ kernels with")

CHOICES = list(itertools.product(("token", "anchor"), ("start", "zero")))
SIZES = [(64, 32, 80), (22, 5, 13), (16, 40, 100), (1, 1, 3)]  # K, C, T; the last chunk is unfinished in most


def draw(dim: int, length: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Arguments of a scan of two sequences and two heads, near what a trained model has."""
    g = torch.Generator().manual_seed(dim)
    streams = torch.randn(2, length, 3, 2, dim, generator=g, dtype=dtype).unbind(2)
    gates = [torch.randn(2, length, 2, generator=g, dtype=dtype) + mean for mean in (1.0, 5.0)]
    count = 3 * dim + 2
    base = torch.eye(count, dim, dtype=dtype) + 0.1 * torch.randn(2, count, dim, generator=g, dtype=dtype)
    rates = 0.5 + 0.1 * torch.randn(2, count, generator=g, dtype=dtype)
    return [*streams, *gates, base, rates, 0.1 * torch.randn(2, 2, count, dim, generator=g, dtype=dtype)]


def results(native: bool, data: list[torch.Tensor], options: RuleOptions) -> list[torch.Tensor | None]:
    """Outputs, next state and all gradients of a loss of both."""
    data = [t.detach().requires_grad_() for t in data]
    out, new = chunk_scan(*data, options=options) if native else ChunkScan.apply(*data, options)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum() + new.square().sum()
    return [out, new, *torch.autograd.grad(loss, data, allow_unused=True)]


@pytest.mark.parametrize(("read", "retain"), CHOICES)
@pytest.mark.parametrize(("dim", "chunk", "length"), SIZES)
def test_it_equals_torch(dim: int, chunk: int, length: int, read: str, retain: str) -> None:
    options = RuleOptions(chunk, read, retain)
    for found, expected in zip(*(results(native, draw(dim, length), options) for native in (True, False)), strict=True):
        if expected is None:
            assert found is None, "base, with retain='zero'"
        else:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_float32_is_as_exact_as_torch() -> None:
    options = RuleOptions(32)
    exact = results(False, draw(64, 80), options)
    errors = []
    for native in (True, False):
        found = results(native, [t.float() for t in draw(64, 80)], options)
        errors.append([float((f - e).detach().norm() / e.detach().norm()) for f, e in zip(found, exact, strict=True)])
    assert all(ours < 2 * torchs + 1e-6 for ours, torchs in zip(*errors, strict=True)), errors


@pytest.mark.parametrize(("dim", "chunk", "length"), SIZES[1:3])
def test_a_nan_stays_in_its_sequence(dim: int, chunk: int, length: int) -> None:
    data = draw(dim, length)
    data[0] = data[0].clone()
    data[0][0, 3] = torch.nan
    expected = results(True, draw(dim, length), RuleOptions(chunk))
    out, new, *gradients = results(True, data, RuleOptions(chunk))
    assert out[0].isnan().any()
    assert all(g[0].isnan().any() for g in gradients[:5])
    torch.testing.assert_close((out[1], new[1]), (expected[0][1], expected[1][1]), rtol=0, atol=0)
    for found, same in zip((*gradients[:5], gradients[7]), (*expected[2:7], expected[9]), strict=True):
        torch.testing.assert_close(found[1], same[1], rtol=0, atol=0)


def test_threads_share_heads_and_change_nothing() -> None:
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(True, draw(22, 13), RuleOptions(5)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_states_of_chunks_are_kept_for_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    run = native_train._run

    def spy(direction: str, options: RuleOptions, tensors: Any) -> None:
        kept.append("anchors" in tensors)
        run(direction, options, tensors)

    monkeypatch.setattr(native_train, "_run", spy)
    data = [t.detach().requires_grad_() for t in draw(4, 12)]
    dispatching.chunk_scan(*data, RuleOptions(4))
    with torch.no_grad():
        dispatching.chunk_scan(*data, RuleOptions(4))
    dispatching.chunk_scan(*(t.detach() for t in data), RuleOptions(4))
    assert kept == [True, False, False]


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)], ids=["no sequences", "no tokens"])
def test_nothing_to_read(shape: tuple[int, int]) -> None:
    batch, length = shape
    data = [t[:batch, :length] if i < 5 else t for i, t in enumerate(draw(4, 8))]
    data[7] = data[7][:batch]
    out, new, *gradients = results(True, data, RuleOptions(4))
    assert out.numel() == 0
    assert torch.equal(new, data[7])
    assert not gradients[5].any()


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (1, lambda t: t[:, :-1]),
        (3, lambda t: t.unsqueeze(-1)),
        (5, lambda t: t[:, :-1]),
        (6, lambda t: t[:, :-1]),
        (7, lambda t: t.float()),
    ],
)
def test_what_does_not_fit_is_named(place: int, wrong: Any) -> None:
    data = draw(4, 8)
    data[place] = wrong(data[place])
    name = ("xq", "xk", "xv", "eta", "alpha", "base", "rates", "state")[place]
    with pytest.raises(ValueError, match=rf"^{name} is .* it must be"):
        chunk_scan(*data, options=RuleOptions(4))


def test_a_layer_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    module, x = SelfModifying(6, 2, 4, RuleOptions(4)), torch.randn(2, 11, 6)
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    gradients = []
    for scan in (None, chunk_scan):
        monkeypatch.setattr("nested_runtime.kernels.delta_rule.chunk.function", lambda *_, scan=scan: scan)
        state = {s.name: torch.zeros(2, *s.shape) for s in module.state()}
        out, _ = module.scan(x, state, 1)
        gradients.append(torch.autograd.grad(out.square().sum(), list(module.parameters())))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_who_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = function.__wrapped__
    for dtype in (torch.float32, torch.float64):
        assert choose("chunk_scan", "cpu", dtype) is chunk_scan
    assert choose("chunk_scan", "cpu", torch.bfloat16) is None
    assert choose("low_rank_apply", "cpu", torch.float32) is None
    for other in ("reference", "numba"):
        monkeypatch.setenv("NESTED_KERNELS", other)
        assert choose("chunk_scan", "cpu", torch.float32) is None


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> None:
        raise ImportError("there is no g++")

    monkeypatch.setattr("nested_runtime.kernels.native.abi.load", nothing)
    assert function.__wrapped__("chunk_scan", "cpu", torch.float32) is None
    monkeypatch.setenv("NESTED_KERNELS", "native")
    with pytest.raises(ConfigError, match=r"NESTED_KERNELS=native .*there is no g\+\+"):
        function.__wrapped__("chunk_scan", "cpu", torch.float32)
