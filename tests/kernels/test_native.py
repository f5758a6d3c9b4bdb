"""The C++ stack: equal to the blocks one by one, the same to the bit in any schedule, renewed with its sources."""

from __future__ import annotations

import copy
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.core import Batch
from nested_runtime.engine.runner import state_specs
from nested_runtime.kernels.int8_linear.reference import int8_product
from nested_runtime.kernels.native import compiler
from nested_runtime.models.fused import Fused
from nested_runtime.models.hope import Hope, HopeConfig
from nested_runtime.state.pool import SlotPool

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the C++ kernels with")

EXAMPLES = settings(max_examples=15, deadline=None)
SHAPES = {
    "tiny": {"heads": 2, "head_dim": 8, "chunk": 4},
    "nano": {"heads": 2, "head_dim": 64, "chunk": 32, "conv_width": 8},
    "odd": {"heads": 3, "head_dim": 22, "chunk": 5, "read": "anchor", "retain": "zero"},
    "zero": {"heads": 2, "head_dim": 32, "chunk": 5, "retain": "zero"},
}
VOCAB, SESSIONS = 40, 3
Schedule = list[list[tuple[int, int]]]  # steps of (session, tokens)


def build(shape: str, dtype: torch.dtype = torch.float32, int8: bool = False) -> Hope:
    torch.manual_seed(3)
    model = Hope(HopeConfig(VOCAB, 36, 2, **SHAPES[shape])).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter)).copy_(parameter.bfloat16())
    if int8:
        model.quantize()
    return model


@torch.inference_mode()
def read(model: Hope, texts: torch.Tensor, schedule: Schedule) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logits of every session [T, V] and the pool after the schedule."""
    pool = SlotPool(state_specs(model), SESSIONS).tensors
    done, seen = [0] * SESSIONS, [[] for _ in range(SESSIONS)]
    for step in schedule:
        ends = list(itertools.accumulate((count for _, count in step), initial=0))
        batch = Batch(
            torch.cat([texts[s, done[s] : done[s] + count] for s, count in step]),
            torch.tensor(ends, dtype=torch.int32),
            torch.tensor([s + 1 for s, _ in step], dtype=torch.int32),
            torch.tensor([done[s] for s, _ in step]),
        )
        for (s, count), piece in zip(step, model.logits(model(batch, pool)).split([n for _, n in step]), strict=True):
            seen[s].append(piece)
            done[s] += count
    return [torch.cat(parts) for parts in seen], pool


def draw_schedule(data: st.DataObject, length: int) -> Schedule:
    left, schedule = [length] * SESSIONS, []
    while any(left):
        chosen = data.draw(st.lists(st.sampled_from([s for s in range(SESSIONS) if left[s]]), unique=True, min_size=1))
        step = [(s, data.draw(st.sampled_from([1, 2, 7, 17, 90]) | st.integers(1, left[s]))) for s in chosen]
        step = [(s, min(count, left[s])) for s, count in step]
        for s, count in step:
            left[s] -= count
        schedule.append(step)
    return schedule


SCHEDULE = [[(0, 70), (2, 1)], [(2, 40), (1, 89), (0, 1)], [(0, 1), (2, 1), (1, 1)], [(2, 48), (0, 18)]]


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks run in torch from here on."""
    monkeypatch.setattr(Fused, "get", lambda self, parts, make: None)
    monkeypatch.setattr("nested_runtime.memory.self_modifying.packed_kernels", lambda *_: None)


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Of all logits, over their size."""
    one, other = torch.cat(found), torch.cat(expected)
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_stack_equals_the_blocks_one_by_one(
    shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = build(shape, dtype), torch.randint(VOCAB, (SESSIONS, 90))
    found, pool = read(model, texts, SCHEDULE)
    assert model._body.packed is not None
    one_by_one(monkeypatch)
    expected, expected_pool = read(model, texts, SCHEDULE)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for a, b in [*zip(found, expected, strict=True), *((pool[n], expected_pool[n]) for n in pool)]:
        assert float((a - b).abs().max() / b.abs().max().clamp(min=1e-2)) <= tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_that_bfloat16_holds_are_the_same_stored_in_either(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = torch.randint(VOCAB, (SESSIONS, 90))
    halves, pool = read(build(shape), texts, SCHEDULE)
    monkeypatch.setattr("nested_runtime.kernels.native.stack._fits_bf16", lambda _: False)
    floats, other_pool = read(build(shape), texts, SCHEDULE)
    assert all(torch.equal(a, b) for a, b in zip(halves, floats, strict=True))
    assert all(torch.equal(pool[name], other_pool[name]) for name in pool)


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_that_bfloat16_does_not_hold(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = build(shape), torch.randint(VOCAB, (SESSIONS, 90))
    for block in model.blocks:
        block.memory.base.add_(0.01 * torch.randn_like(block.memory.base))
    found, _ = read(model, texts, SCHEDULE)
    one_by_one(monkeypatch)
    assert error(found, read(model, texts, SCHEDULE)[0]) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_blocks_with_every_product_in_int8(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = build(shape), torch.randint(VOCAB, (SESSIONS, 90))
    exact, _ = read(model, texts, SCHEDULE)
    model.quantize()
    found, _ = read(model, texts, SCHEDULE)
    one_by_one(monkeypatch)
    for module in ("memory.streams", "memory.cms", "models.blocks"):
        monkeypatch.setattr(f"nested_runtime.{module}.linear", int8_product)
    expected, _ = read(model, texts, SCHEDULE)
    # Where a number lies between two integers, float32 in another order may round it the other way.
    assert error(found, expected) < 0.1 * error(found, exact) < 0.02


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 90), st.data())
def test_no_schedule_changes_one_bit(shape: str, int8: bool, seed: int, length: int, data: st.DataObject) -> None:
    """Splits, companions, chunk borders: logits and state are the same bits as those of each session alone."""
    model = build(shape, int8=int8)
    texts = torch.randint(VOCAB, (SESSIONS, length), generator=torch.Generator().manual_seed(seed))
    found, pool = read(model, texts, draw_schedule(data, length))
    alone, alone_pool = read(model, texts, [[(s, length)] for s in range(SESSIONS)])
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert [name for name in pool if not torch.equal(pool[name], alone_pool[name])] == []


def packed_again(change: Callable[[Hope], None]) -> bool:
    """Whether the model's answer follows a change of its parameters."""
    model, texts, schedule = build("tiny"), torch.arange(SESSIONS * 5).view(SESSIONS, 5), [[(0, 5)], [(1, 5)], [(2, 5)]]
    before, _ = read(model, texts, schedule)
    change(model)
    found, _ = read(model, texts, schedule)
    model._body, model._output = Fused(), Fused()
    expected, _ = read(model, texts, schedule)
    return torch.equal(found[0], expected[0]) and not torch.equal(found[0], before[0])


def test_weights_are_packed_again_when_they_change() -> None:
    other = Hope(build("tiny").config).state_dict()
    assert packed_again(lambda model: model.blocks[1].cms.up[0].mul_(1.5))
    assert packed_again(lambda model: model.embed.mul_(1.5))
    assert packed_again(lambda model: (model.load_state_dict(other), None)[1])


def test_logits_follow_a_model_to_another_type() -> None:
    model, texts = build("tiny"), torch.zeros(SESSIONS, 3, dtype=torch.int64)
    model.embed.add_(1e-4 * torch.randn_like(model.embed))  # not what bfloat16 can hold
    read(model, texts, [[(0, 3)], [(1, 3)], [(2, 3)]])
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        hidden = torch.randn(2, model.embed.shape[1], dtype=dtype)
        with torch.inference_mode():
            found = model.logits(hidden)
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, (hidden @ model.embed.T).to(found.dtype), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(
    ("token", "end", "error", "says"),
    [
        (-1, 5, IndexError, f"token id -1 is not in 0..{VOCAB - 1}"),
        (VOCAB, 5, IndexError, f"token id {VOCAB} is not in 0..{VOCAB - 1}"),
        (3, 6, ValueError, "cu_seqlens ends at 6, but there are 5 tokens"),
        (3, 4, ValueError, "cu_seqlens ends at 4, but there are 5 tokens"),
    ],
)
@torch.inference_mode()
def test_a_step_that_is_refused_changes_nothing(token: int, end: int, error: type[Exception], says: str) -> None:
    model = build("tiny")
    pool = SlotPool(state_specs(model), SESSIONS).tensors
    batch = Batch(torch.tensor([1, 2, 3, 4, token]), torch.tensor([0, 2, end], dtype=torch.int32),
                  torch.tensor([1, 2], dtype=torch.int32), torch.tensor([0, 0]))  # fmt: skip
    with pytest.raises(error, match=re.escape(says)):
        model(batch, pool)
    assert not any(tensor.any() for tensor in pool.values())


def test_a_model_that_was_served_can_be_copied() -> None:
    model, texts = build("tiny"), torch.zeros(SESSIONS, 3, dtype=torch.int64)
    schedule = [[(0, 3)], [(1, 3)], [(2, 3)]]
    found, _ = read(model, texts, schedule)
    again, _ = read(copy.deepcopy(model), texts, schedule)
    assert torch.equal(found[0], again[0])


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_a_nan_stays_with_its_session(int8: bool) -> None:
    model, texts = build("nano", int8=int8), torch.randint(VOCAB, (SESSIONS, 40))
    pool = SlotPool(state_specs(model), SESSIONS).tensors
    pool["blocks.0.memory.anchor"][2].fill_(torch.nan)
    batch = Batch(texts.flatten(), torch.arange(4, dtype=torch.int32) * 40, torch.arange(1, 4, dtype=torch.int32),
                  torch.zeros(3, dtype=torch.int64))  # fmt: skip
    with torch.inference_mode():
        logits = model.logits(model(batch, pool))
    bad = ~logits.isfinite().all(-1)
    assert bad.tolist() == [False] * 40 + [True] * 40 + [False] * 40


def test_a_library_belongs_to_its_sources_and_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gcc = shutil.which("g++") or ""
    before = compiler._digest(gcc)
    assert compiler._digest(gcc) == before
    for source in compiler._sources():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(compiler, "HERE", tmp_path)
    assert compiler._digest(gcc) == before
    with (tmp_path / "vector.h").open("a") as header:
        header.write("// changed\n")
    assert compiler._digest(gcc) != before
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-O2"))
    (tmp_path / "vector.h").write_bytes((Path(compiler.__file__).parent / "vector.h").read_bytes())
    assert compiler._digest(gcc) != before


def test_a_folder_others_may_write_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "nested-runtime").mkdir()
    (tmp_path / "nested-runtime").chmod(0o777)
    with pytest.raises(OSError, match="may be written by others"):
        compiler._folder()


def test_without_a_compiler_numba_serves() -> None:
    code = (
        "import torch; from nested_runtime.kernels.dispatch import KernelConfig, choose\n"
        "assert choose(KernelConfig(), 'cpu', torch.float32).name == 'numba'\n"
        "from nested_runtime.errors import ConfigError\n"
        "try: choose(KernelConfig('native'), 'cpu', torch.float32)\n"
        "except ConfigError as error: print(error)\n"
    )
    run_in = {"CXX": "no-such-compiler", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=run_in, check=True, timeout=200, capture_output=True)
    assert b"NESTED_KERNELS=native cannot be used: there is no g++" in done.stdout
