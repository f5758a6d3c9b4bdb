"""int8 weights: the bound on every weight, products of any number of rows, gradients, embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nested_runtime.kernels.int8_linear import numba, reference
from nested_runtime.memory.frozen import Int8Weight, embedding, linear, quantize


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=dtype)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_every_weight_is_within_half_a_step(scale: float) -> None:
    wide = matrix(7, 30) * scale
    wide[3] = 0
    weight = Int8Weight(wide)
    steps = wide.abs().amax(1) / 127
    error = (weight.rows(torch.arange(7)) - wide).abs()
    assert bool((error <= steps[:, None] * 0.501).all())
    assert weight.q.dtype == torch.int8
    assert (weight.shape, weight.dtype) == ((7, 30), torch.float32)


@pytest.mark.parametrize("rows", [1, 3, numba.MAX_ROWS, numba.MAX_ROWS + 1, 40])
@pytest.mark.parametrize("outputs", [1, 6, 8])
def test_products_do_not_depend_on_how_many_rows_there_are(rows: int, outputs: int) -> None:
    weight, x = Int8Weight(matrix(outputs, 33)), matrix(rows, 33)
    expected = x.double() @ weight.rows(torch.arange(outputs)).double().t()
    with torch.no_grad():
        found = linear(x.view(rows, 1, 33), weight)[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        reference.int8_linear(x, weight.q, weight.scale).double(), expected, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(numba.int8_linear(x, weight.q, weight.scale).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_nan_stays_one() -> None:
    x = torch.ones(2, 8)
    x[1, 3] = float("nan")
    with torch.no_grad():
        assert linear(x, Int8Weight(matrix(5, 8))).isnan().any(1).tolist() == [False, True]


def test_gradients_reach_the_activations() -> None:
    weight, x = Int8Weight(matrix(6, 9, torch.float64)), matrix(4, 9, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: linear(x, weight, torch.ones(6).double()), (x,))


def test_a_module_is_quantized_in_place_and_once() -> None:
    module = nn.Module()
    module.w = nn.Parameter(matrix(6, 9))
    quantize(module, "w")
    first = module.w
    quantize(module, "w")
    assert module.w is first
    assert list(module.parameters()) == []
    index = torch.tensor([[5, 0]])
    torch.testing.assert_close(embedding(index, module.w), matrix(6, 9)[index], rtol=0.0, atol=0.02)
