"""Products in int8: the sums that integers have, rounding of half a unit, models that can and cannot have them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from nested_runtime.errors import ConfigError
from nested_runtime.kernels.int8_linear.reference import int8_product
from nested_runtime.kernels.native import compiler
from nested_runtime.kernels.native.stack import Linear
from nested_runtime.models.hope import Hope
from nested_runtime.models.loading import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the C++ kernels with")


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 16, 65])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 2), (63, 36), (64, 64), (1032, 256), (130, 770)])
def test_products_are_those_of_the_integers(rows: int, outputs: int, inputs: int) -> None:
    w, x = torch.randn(outputs, inputs), torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
    assert torch.equal(Linear(w, int8=True)(x), int8_product(x, w))


@pytest.mark.parametrize("outputs", [5, 300])
def test_rounding_is_all_that_is_lost(outputs: int) -> None:
    w, x = torch.randn(outputs, 256), torch.randn(20, 256)
    found, exact = Linear(w, int8=True)(x), x @ w.T
    # Half a unit of either factor, over independent terms, at five standard deviations.
    unit_x, unit_w = x.abs().amax(1, keepdim=True) / 127, (w.abs().amax(1) / 127)[None]
    spread = ((unit_x * w.norm(dim=1)) ** 2 + (unit_w * x.norm(dim=1, keepdim=True)) ** 2).div(12).sqrt()
    assert bool(((found - exact).abs() <= 5 * spread).all())


def test_rows_and_outputs_of_zeros_give_zeros() -> None:
    w, x = torch.randn(70, 64), torch.randn(3, 64)
    w[5], x[1] = 0, 0
    found = Linear(w, int8=True)(x)
    assert not found[1].any()
    assert not found[:, 5].any()
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_in_its_row(bad: float) -> None:
    x = torch.randn(4, 64)
    x[2, 63] = bad
    found = Linear(torch.randn(70, 64), int8=True)(x)
    assert found.isfinite().all(1).tolist() == [True, True, False, True]
    assert not found[2].isfinite().any()


def test_weights_of_any_strides_and_numbers_next_to_nothing() -> None:
    w, x = torch.randn(64, 130).T, torch.randn(3, 64)
    assert torch.equal(Linear(w, int8=True)(x), int8_product(x, w))
    x[1] = 1e-38
    assert bool((Linear(w, int8=True)(x)[1].abs() < 1e-30).all())


@pytest.mark.parametrize(("shape", "dtype"), [((8, 8), torch.float64), ((1, (1 << 16) + 2), torch.float32)])
def test_weights_that_cannot_be_int8(shape: tuple[int, int], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="cannot be served in int8"):
        Linear(torch.ones(shape, dtype=dtype), int8=True)


def test_every_machine_has_the_sums_of_the_integers(tmp_path: Path) -> None:
    """`dot4` with the instruction, where there is one, and in vectors of either width, over all pairs of bytes."""
    source = tmp_path / "dot4.cpp"
    source.write_text(
        f'#include <cstdio>\n#include "{Path(compiler.__file__).parent / "gemm.h"}"\n'
        "int main() { for (int a = 0; a < 256; a++) for (int w = -128; w < 128; w++) {\n"
        "  const Ints four = all(int32_t((w & 255) * 0x10001u | 0x7f00u));\n"
        '  std::printf("%d\\n", dot4(all(7), all(int32_t(a * 0x01010101u)), four)[3]); } }\n'
    )
    for flags in ([], ["-mno-avx512vnni"], ["-mno-avx512f"]):
        program = tmp_path / f"dot4{len(flags)}{''.join(flags)}"
        command = ["g++", *(flag for flag in compiler.FLAGS if flag != "-shared"), *flags]
        subprocess.run([*command, str(source), "-o", str(program)], check=True, timeout=200)
        lines = subprocess.run([str(program)], check=True, capture_output=True, timeout=60).stdout.split()
        # Bytes 0 to 3 of the weights are w, 127, w, 0.
        assert list(map(int, lines)) == [7 + a * (2 * w + 127) for a in range(256) for w in range(-128, 128)]


def tiny(family: str, **fields: object) -> torch.nn.Module:
    model = build(family, {**Hope.TINY, **fields})
    return model.eval().requires_grad_(False)


def test_models_that_cannot_have_int8_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    level = {"levels": [{"chunk": 8, "hidden": 16}], "adaptive_blocks": 1}
    for model in (tiny("hope").double(), tiny("hope", **level), tiny("hope", momentum=True)):
        with pytest.raises(ConfigError, match=r"int8 weights need the C\+\+ kernels"):
            model.quantize()
        assert not model.int8
    monkeypatch.setattr("nested_runtime.models.fused.packed_kernels", lambda *_: None)
    with pytest.raises(ConfigError, match=r"int8 weights need the C\+\+ kernels"):
        tiny("hope").quantize()
