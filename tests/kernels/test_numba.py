"""The CPU kernels, numba and C++, against the token-by-token reference, on ragged batches cut into steps at random."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.core import Batch
from nested_runtime.errors import ConfigError
from nested_runtime.kernels.delta_rule.layout import NORM_EPS, RuleOptions
from nested_runtime.kernels.delta_rule.reference import reference_scan
from nested_runtime.kernels.delta_rule.segment import DeltaState, fold
from nested_runtime.kernels.dispatch import KernelConfig, Kernels, choose, packed_kernels
from nested_runtime.kernels.jit import sources
from nested_runtime.kernels.short_conv.reference import short_conv
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.self_modifying import SelfModifying

EXAMPLES = settings(max_examples=15, deadline=None)
CHOICES = list(itertools.product(("token", "anchor"), ("start", "zero")))
ALPHA = {"usual": 4.0, "keeps all": 30.0, "forgets all": -30.0, "mixed": 0.0}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
LEAST = 1e-2  # of a scale: memories near zero are differences of numbers near one
MAGNIFIED = 10 * torch.finfo(torch.float32).eps * NORM_EPS**-0.5
SEED = st.integers(0, 2**31)
SLOTS = 5  # slot 5 belongs to nobody
F64, F32 = torch.float64, torch.float32


CHOSEN: list[Kernels] = []  # the implementation under test


@pytest.fixture(autouse=True, params=["native", "numba"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        kernels = choose(KernelConfig(request.param), "cpu", F32)
    except ConfigError as error:
        pytest.skip(str(error))
    assert kernels is not None
    CHOSEN[:] = [kernels]
    yield request.param
    CHOSEN.clear()


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Every torch.empty is full of NaN: what a kernel leaves unwritten shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Layer:
    """Parameters and inputs of sessions in slots 1.. that read `lengths` tokens each."""

    seed: int
    lengths: list[int]
    options: RuleOptions
    dtype: torch.dtype = F64
    alpha: str = "usual"
    equal_keys: bool = False
    heads: int = 2
    dim: int = 6
    texts: list[tuple[torch.Tensor, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=F64).to(self.dtype)

        rows = 3 * self.dim + 2
        self.base, self.rates = 0.5 * normal(self.heads, rows, self.dim), 0.5 * normal(self.heads, 4)
        self.texts = [(normal(n, 3, self.heads, self.dim), normal(n, 2, self.heads)) for n in self.lengths]
        for mixed, logits in self.texts:
            logits[:, 1] = logits[:, 1] * (20 if self.alpha == "mixed" else 1) + ALPHA[self.alpha]
            if self.equal_keys:
                mixed[:, 1] = mixed[:1, 1] + 1e-6 * mixed[:, 1]

    def pool(self) -> dict[str, torch.Tensor]:
        h, k, c, r = self.heads, self.dim, self.options.chunk, 3 * self.dim + 2
        shapes = {"anchor": (h, r, k), "tail_k": (h, c, k), "tail_d": (h, c, r), "tail_g": (h, c)}
        return {name: torch.zeros(SLOTS + 1, *shape, dtype=self.dtype) for name, shape in shapes.items()}

    def read(self, pool: dict[str, torch.Tensor], spans: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """One step: a span (session, begin, end) is the tokens of a session's text it reads; session -1 is padding."""
        pieces = [tuple(t[begin:end] for t in self.texts[max(s, 0)]) for s, begin, end in spans]
        mixed, logits = (torch.cat([p[i] for p in pieces]) for i in (0, 1))
        batch = pack([(s + 1, begin, end - begin) for s, begin, end in spans])
        out = CHOSEN[0].packed_scan(mixed, logits, self.base, self.rates, pool, batch, self.options)
        assert torch.isfinite(out).all()
        return list(out.split([end - begin for _, begin, end in spans]))

    def expected(self, session: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads [T, H, K] and the live state [H, R, K] after the whole text, from the equations in float64."""
        mixed, logits = (t.double() for t in self.texts[session])
        base, rates = self.base.double(), row_rates(self.rates.double(), self.dim)
        outs, lives = [], []
        for h in range(self.heads):
            fresh = base[h] if self.options.retain == "zero" else torch.zeros_like(base[h])
            streams, gates = (mixed[:, i, h] for i in range(3)), (logits[:, i, h] for i in range(2))
            out, live, _ = reference_scan(*streams, *gates, base[h], rates[h], fresh, fresh, 0, self.options)
            outs.append(out)
            lives.append(live - fresh)
        return torch.stack(outs, 1), torch.stack(lives)

    def live(self, pool: dict[str, torch.Tensor], session: int) -> torch.Tensor:
        """The session's deviation from the start [H, R, K]: its anchor with the unfinished tail folded in."""
        done = self.lengths[session] % self.options.chunk
        state = DeltaState(*(pool[name][session + 1].double() for name in DeltaState._fields))
        if not done:
            return state.anchor
        shift = self.base.double() if self.options.retain == "zero" else 0.0
        tail = (t[:, :done] for t in state[1:])
        return fold(DeltaState(state.anchor + shift, *tail)).anchor - shift


def row_rates(rates: torch.Tensor, dim: int) -> torch.Tensor:
    count = torch.tensor([dim, 1, 1, dim, dim])
    return torch.cat([rates, torch.ones_like(rates[:, :1])], 1).repeat_interleave(count, dim=1)


def pack(spans: list[tuple[int, int, int]]) -> Batch:
    """A batch of (slot, position, tokens)."""
    slots, positions, counts = zip(*spans, strict=True)
    ends = list(itertools.accumulate(counts, initial=0))
    return Batch(
        token_ids=torch.zeros(ends[-1], dtype=torch.int64),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        slots=torch.tensor(slots, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int64),
    )


def draw_steps(data: st.DataObject, lengths: list[int]) -> list[list[tuple[int, int, int]]]:
    """Steps in which all sessions come to their ends; some have padding sequences, some read nothing."""
    done, steps = [0] * len(lengths), []
    while done != lengths:
        open_ = [s for s, n in enumerate(lengths) if done[s] < n]
        chosen = data.draw(st.lists(st.sampled_from(open_), unique=True, min_size=1), "sessions")
        counts = [data.draw(st.integers(0, lengths[s] - done[s]), "tokens") for s in chosen]
        counts[0] = max(counts[0], 1)
        spans = [(s, done[s], done[s] + n) for s, n in zip(chosen, counts, strict=True)]
        for s, _, end in spans:
            done[s] = end
        if data.draw(st.booleans(), "padding"):
            spans.insert(data.draw(st.integers(0, len(spans)), "where"), (-1, 0, min(2, lengths[0])))
        steps.append(spans)
    return steps


def run(layer: Layer, steps: list[list[tuple[int, int, int]]]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Reads of every session and the pool afterwards; padding and a slot nobody uses must stay as they are."""
    pool = layer.pool()
    for tensor in pool.values():
        tensor[SLOTS] = 7.0
    reads: list[list[torch.Tensor]] = [[] for _ in layer.lengths]
    for spans in steps:
        for (session, _, _), out in zip(spans, layer.read(pool, spans), strict=True):
            if session >= 0:
                reads[session].append(out)
    for tensor in pool.values():
        assert not tensor[0].any(), "slot 0 must stay zero"
        assert (tensor[SLOTS] == 7.0).all(), "a neighbour's slot was written"
    return [torch.cat(parts) if parts else torch.empty(0) for parts in reads], pool


def relative(found: torch.Tensor, expected: torch.Tensor, least: float = LEAST) -> float:
    scale = expected.abs().max().clamp(min=least)
    return float((found - expected).abs().max() / scale)


LENGTHS = st.lists(st.integers(1, 15), min_size=1, max_size=3)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize(("read", "retain"), CHOICES)
@EXAMPLES
@given(SEED, LENGTHS, st.integers(1, 6), st.sampled_from(list(ALPHA)), st.booleans(), st.data())
def test_scan_equals_the_reference_however_it_is_cut(
    read: str, retain: str, dtype: torch.dtype, seed: int, lengths: list[int], chunk: int, alpha: str, equal: bool,
    data: st.DataObject,
) -> None:  # fmt: skip
    layer = Layer(seed, lengths, RuleOptions(chunk, read, retain), dtype, alpha, equal)
    # A memory forgotten to zero is base + X with X = -base: rounding, which the norm of keys magnifies by
    # NORM_EPS**-0.5, to about 1e-4 beside numbers of one.
    is_rounding = dtype == F32 and retain == "zero" and alpha in ("mixed", "forgets all")
    tolerance, least = (MAGNIFIED, 1.0) if is_rounding else (TOLERANCE[dtype], LEAST)
    reads, pool = run(layer, draw_steps(data, lengths))
    for session, found in enumerate(reads):
        out, live = layer.expected(session)
        assert relative(found, out, least) <= tolerance
        assert relative(layer.live(pool, session), live, least) <= tolerance
        done = lengths[session] % chunk
        assert not any(pool[name][session + 1, :, done:].any() for name in ("tail_k", "tail_d", "tail_g"))


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("dim", [19, 64], ids=["odd", "nano"])
@EXAMPLES
@given(SEED, st.lists(st.integers(1, 80), min_size=1, max_size=3), st.sampled_from(CHOICES), st.data())
def test_splits_and_companions_do_not_change_one_bit(
    dim: int, dtype: torch.dtype, seed: int, lengths: list[int], choice: tuple[str, str], data: st.DataObject
) -> None:
    layer = Layer(seed, lengths, RuleOptions(32, *choice), dtype, dim=dim)
    reads, pool = run(layer, draw_steps(data, lengths))
    for session, length in enumerate(lengths):
        alone, alone_pool = run(layer, [[(session, 0, length)]])
        assert torch.equal(reads[session], alone[session])
        for name, tensor in pool.items():
            assert torch.equal(tensor[session + 1], alone_pool[name][session + 1]), name


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_scan_of_a_nano_head_equals_the_reference(dtype: torch.dtype) -> None:
    layer = Layer(3, [100], RuleOptions(), dtype, heads=1, dim=64)
    (read,), pool = run(layer, [[(0, 0, 70)], *([(0, t, t + 1)] for t in range(70, 100))])
    out, live = layer.expected(0)
    assert relative(read, out) <= TOLERANCE[dtype]
    assert relative(layer.live(pool, 0), live) <= TOLERANCE[dtype]


def test_a_nan_stays_with_its_sequence_and_stays_a_nan() -> None:
    layer = Layer(5, [9, 9], RuleOptions(4), F32)
    expected = layer.expected(1)[0]
    layer.texts[0][1][3] = torch.nan
    mixed, logits = (torch.cat([layer.texts[s][i] for s in (0, 1)]) for i in (0, 1))
    out = CHOSEN[0].packed_scan(
        mixed, logits, layer.base, layer.rates, layer.pool(), pack([(1, 0, 9), (2, 0, 9)]), layer.options
    )
    assert torch.isfinite(out[:3]).all()
    assert torch.isnan(out[3:9]).all()
    assert relative(out[9:], expected) <= TOLERANCE[F32]


@EXAMPLES
@given(SEED, LENGTHS, st.integers(1, 5), st.sampled_from([F64, F32]), st.data())
def test_convolution_equals_the_reference_to_the_bit_of_any_split(
    seed: int, lengths: list[int], width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, 7, generator=g, dtype=dtype)
    texts = [torch.randn(n, 7, generator=g, dtype=dtype) for n in lengths]
    whole, pool = convolve(texts, weight, [[(s, 0, n) for s, n in enumerate(lengths)]])
    cut, cut_pool = convolve(texts, weight, draw_steps(data, lengths))
    assert torch.equal(pool, cut_pool)
    for text, a, b, window in zip(texts, whole, cut, pool[1:], strict=False):
        expected, carried = short_conv(text[None], torch.zeros(1, width - 1, 7, dtype=dtype), weight)
        torch.testing.assert_close(a, expected[0])
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # SiLU is torch's, whose last bit depends on the shape
        assert torch.equal(window, carried[0])


def convolve(
    texts: list[torch.Tensor], weight: torch.Tensor, steps: list[list[tuple[int, int, int]]]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    pool = torch.zeros(SLOTS + 1, weight.shape[0] - 1, weight.shape[1], dtype=weight.dtype)
    pool[SLOTS] = 7.0
    parts: list[list[torch.Tensor]] = [[] for _ in texts]
    for spans in steps:
        x = torch.cat([texts[max(s, 0)][begin:end] for s, begin, end in spans])
        batch = pack([(s + 1, begin, end - begin) for s, begin, end in spans])
        out = CHOSEN[0].packed_conv(x, pool, weight, batch)
        assert torch.isfinite(out).all()
        for (s, _, _), piece in zip(spans, out.split([end - begin for _, begin, end in spans]), strict=True):
            if s >= 0:
                parts[s].append(piece)
    assert not pool[0].any()
    assert (pool[SLOTS] == 7.0).all()
    return [torch.cat(p) for p in parts], pool


def rule(dtype: torch.dtype, options: RuleOptions) -> SelfModifying:
    torch.manual_seed(11)
    module = SelfModifying(12, 2, 6, options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize(("read", "retain"), CHOICES)
def test_the_rule_serves_the_same_with_and_without_kernels(read: str, retain: str, dtype: torch.dtype) -> None:
    module = rule(dtype, RuleOptions(4, read, retain))
    pools = [{s.name: torch.zeros(4, *s.shape, dtype=dtype) for s in module.state()} for _ in range(2)]
    with torch.inference_mode():
        for spans in ([(1, 0, 9), (0, 0, 2), (2, 0, 1)], [(2, 1, 1), (1, 9, 1)], [(1, 10, 2), (2, 2, 13)]):
            x = torch.randn(sum(n for _, _, n in spans), 12, dtype=dtype)
            found = module.apply_packed(x, pools[0], pack(spans))
            expected = UpdateRule.apply_packed(module, x, pools[1], pack(spans))
            assert relative(found, expected) <= TOLERANCE[dtype]
    for name, tensor in pools[0].items():
        assert relative(tensor, pools[1][name]) <= TOLERANCE[dtype]


def test_a_gradient_through_the_pool_fails_instead_of_being_wrong() -> None:
    module = rule(F64, RuleOptions(4))
    pool = {s.name: torch.zeros(2, *s.shape, dtype=F64) for s in module.state()}
    out = module.apply_packed(torch.randn(5, 12, dtype=F64), pool, pack([(1, 0, 5)]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_kernels_are_chosen_by_device_and_dtype() -> None:
    chosen = choose(KernelConfig(), "cpu", F32)
    assert chosen is not None
    assert chosen.name == ("native" if shutil.which("g++") else "numba")
    assert choose(KernelConfig("reference"), "cpu", F32) is None
    assert choose(KernelConfig(), "cpu", torch.bfloat16) is None
    assert choose(KernelConfig(), "meta", F32) is None
    assert packed_kernels("cpu", F32) is packed_kernels("cpu", F32), "chosen once"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "named"),
    [
        ("numba", "cuda", F32, "NESTED_KERNELS=numba .* 'cuda'"),
        ("numba", "cpu", torch.bfloat16, "NESTED_KERNELS=numba .*bfloat16"),
        ("triton", "cpu", F32, "NESTED_KERNELS=triton .* 'cpu'"),
    ],
)
def test_impossible_kernels_are_refused(name: str, device: str, dtype: torch.dtype, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        choose(KernelConfig(name), device, dtype)


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"NESTED_KERNELS is 'cobol'; give one of auto, reference, native, numba, triton"
    ):
        KernelConfig("cobol")


def test_a_changed_helper_file_compiles_anew(tmp_path: Path) -> None:
    for name, text in (("a.py", "x = 1"), ("b/c.py", "y = 2")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = sources.__wrapped__(tmp_path)
    assert sources.__wrapped__(tmp_path) == before
    (tmp_path / "b/c.py").write_text("y = 3")
    assert sources.__wrapped__(tmp_path) != before
    from nested_runtime.kernels.delta_rule import numba

    assert numba._packed._cache._cache_file._source_stamp == sources()


CACHED = "from nested_runtime.kernels.jit import entry\n\n\n@entry\ndef twice(x):\n    return 2 * x\n"


@pytest.mark.parametrize("home", ["home", "/dev/null"], ids=["user cache", "no cache"])
def test_a_read_only_installation_still_compiles(home: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CACHED)
    (tmp_path / "__pycache__").write_text("not a directory")
    run_in = {"HOME": str(tmp_path / home), "PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}"}
    code = "import mine; assert mine.twice(3) == 6"
    subprocess.run([sys.executable, "-c", code], env=run_in, check=True, timeout=120)
    assert bool(list(tmp_path.rglob("*.nbi"))) == (home == "home")
