"""Every path of the rule against the token-by-token reference, which is written from the equations alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.errors import ConfigError
from nested_runtime.kernels.delta_rule.chunk import ChunkScan, chunk_scan
from nested_runtime.kernels.delta_rule.layout import RuleOptions, rows
from nested_runtime.kernels.delta_rule.reference import reference_scan
from nested_runtime.kernels.delta_rule.segment import DeltaState, fold, segment
from nested_runtime.kernels.dispatch import function

EXAMPLES = settings(max_examples=25, deadline=None)
CHOICES = list(itertools.product(("token", "anchor"), ("start", "zero")))
EXACT = {"rtol": 0.0, "atol": 1e-9}
Scan = Callable[..., tuple[torch.Tensor, torch.Tensor]]
ALPHA = {"usual": 4.0, "keeps all": 40.0, "forgets all": -40.0, "mixed": 0.0}


def in_torch(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    out, new = ChunkScan.apply(*arguments)
    return out, new


HAS_CPP = function("chunk_scan", "cpu", torch.float64) is not None
in_cpp = pytest.param(chunk_scan, id="cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="no g++ to build with"))
every_scan = pytest.mark.parametrize("scan", [pytest.param(in_torch, id="torch"), in_cpp])


class Data(NamedTuple):
    """Arguments of `chunk_scan` up to the options."""

    xq: torch.Tensor
    xk: torch.Tensor
    xv: torch.Tensor
    eta: torch.Tensor
    alpha: torch.Tensor
    base: torch.Tensor
    rates: torch.Tensor
    state: torch.Tensor

    def cut(self, begin: int, end: int) -> list[torch.Tensor]:
        return [t[:, begin:end] for t in self[:5]]


def draw(seed: int, length: int, batch: int = 1, heads: int = 1, dim: int = 3, *, alpha: str = "usual") -> Data:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    streams = [normal(batch, length, heads, dim) for _ in range(3)]
    gates = [
        normal(batch, length, heads),
        normal(batch, length, heads) * (20 if alpha == "mixed" else 1) + ALPHA[alpha],
    ]
    count = 3 * dim + 2
    memories = normal(heads, count, dim), 0.5 * normal(heads, count), normal(batch, heads, count, dim)
    return Data(*streams, *gates, *memories)


def near_equal_keys(data: Data) -> Data:
    same = data.xk[:, :1].expand_as(data.xk)
    return data._replace(xk=same + 1e-7 * data.xk)


def reference(data: Data, options: RuleOptions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs [B, T, H, K], live state and anchor [B, H, R, K] from `data.state` at a chunk boundary."""
    outs, lives, anchors = [], [], []
    for b, h in itertools.product(*map(range, data.state.shape[:2])):
        streams = [t[b, :, h] for t in data[:5]]
        state = data.state[b, h]
        out, live, anchor = reference_scan(*streams, data.base[h], data.rates[h], state, state, 0, options)
        outs.append(out)
        lives.append(live)
        anchors.append(anchor)
    shape = data.state.shape[:2]
    return (
        torch.stack(outs).unflatten(0, shape).transpose(1, 2),
        torch.stack(lives).unflatten(0, shape),
        torch.stack(anchors).unflatten(0, shape),
    )


def flat(data: Data, options: RuleOptions) -> tuple[torch.Tensor, torch.Tensor, DeltaState]:
    """Start memories, rates and a fresh tail for `segment`: sequences and heads on one axis."""
    batch, heads, count, dim = data.state.shape
    n = batch * heads
    start = data.base if options.retain == "start" else torch.zeros_like(data.base)
    like = data.state
    tail = (
        like.new_zeros(n, options.chunk, dim),
        like.new_zeros(n, options.chunk, count),
        like.new_zeros(n, options.chunk),
    )
    return start.repeat(batch, 1, 1), data.rates.repeat(batch, 1), DeltaState(data.state.flatten(0, 1), *tail)


def segments(data: Data, options: RuleOptions, cuts: list[int]) -> tuple[torch.Tensor, DeltaState, int]:
    """Outputs, state and tail length after reading in pieces that end at `cuts` and at every chunk boundary."""
    start, rates, state = flat(data, options)
    length, heads = data.xq.shape[1], data.state.shape[1]
    ends = sorted({*cuts, *range(0, length, options.chunk), length} - {0})
    outs, begin = [], 0
    for end in ends:
        pieces = [t.transpose(1, 2).flatten(0, 1) for t in data.cut(begin, end)]
        out, state = segment(*pieces, start, rates, state, begin % options.chunk, options)
        outs.append(out.unflatten(0, (-1, heads)).transpose(1, 2))
        begin = end
    return torch.cat(outs, dim=1), state, length % options.chunk


def live_state(state: DeltaState, done: int) -> torch.Tensor:
    """X_t from the anchor and the tail's factors: folding a tail of exactly `done` tokens."""
    return fold(DeltaState(state.anchor, *(t[:, :done] for t in state[1:]))).anchor if done else state.anchor


@every_scan
@pytest.mark.parametrize(("read", "retain"), CHOICES)
@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 19), st.integers(1, 7), st.sampled_from(list(ALPHA)), st.booleans())
def test_chunk_form_equals_the_reference(
    scan: Scan, read: str, retain: str, seed: int, length: int, chunk: int, alpha: str, equal: bool
) -> None:
    options = RuleOptions(chunk, read, retain)
    data = draw(seed, length, batch=2, heads=2, alpha=alpha)
    data = near_equal_keys(data) if equal else data
    out, new = scan(*data, options)
    expected, live, _ = reference(data, options)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(new, live, **EXACT)


@pytest.mark.parametrize(("read", "retain"), CHOICES)
@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 19), st.integers(1, 7), st.sampled_from(list(ALPHA)), st.data())
def test_segments_of_any_split_equal_the_reference(
    read: str, retain: str, seed: int, length: int, chunk: int, alpha: str, more: st.DataObject
) -> None:
    options = RuleOptions(chunk, read, retain)
    data = draw(seed, length, batch=2, heads=2, alpha=alpha)
    cuts = more.draw(st.lists(st.integers(1, length)), "cuts")
    out, state, done = segments(data, options, cuts)
    expected, live, anchor = reference(data, options)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(live_state(state, done), live.flatten(0, 1), **EXACT)
    # The reference moves its anchor when the next chunk begins, segments when the chunk is full.
    torch.testing.assert_close(state.anchor, (anchor if done else live).flatten(0, 1), **EXACT)
    assert all(not t[:, done:].any() for t in state[1:]), "rows from the tail's end on must stay zero"


def test_memories_of_the_anchor_decide_inside_a_chunk() -> None:
    """The reference is no tautology: reading at the token and at the anchor differ, and so do the two retains."""
    data = draw(0, 12, alpha="mixed")
    outs = [reference(data, RuleOptions(4, read, retain))[0] for read, retain in CHOICES]
    for a, b in itertools.combinations(outs, 2):
        assert (a - b).abs().max() > 1e-3


@every_scan
@pytest.mark.parametrize(("read", "retain"), CHOICES)
def test_gradcheck_of_chunk_scan(scan: Scan, read: str, retain: str) -> None:
    options = RuleOptions(2, read, retain)
    data = [t.requires_grad_() for t in draw(1, 5, dim=2)]
    assert torch.autograd.gradcheck(lambda *t: scan(*t, options), data)


@pytest.mark.parametrize(("read", "retain"), CHOICES)
@pytest.mark.parametrize("full", [True, False], ids=["folded", "unfinished"])
def test_gradcheck_of_segment(read: str, retain: str, full: bool) -> None:
    options = RuleOptions(3 if full else 4, read, retain)
    data = draw(2, 3, dim=2)
    start, rates, state = flat(data, options)
    first, rest = ([t.transpose(1, 2).flatten(0, 1) for t in data.cut(*part)] for part in ((0, 1), (1, 3)))
    _, state = segment(*first, start, rates, state, 0, options)
    inputs = [t.detach().clone().requires_grad_() for t in (*rest, start, rates, *state)]

    def run(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, new = segment(*t[:7], DeltaState(*t[7:]), 1, options)
        return (out, *new)

    assert torch.autograd.gradcheck(run, inputs)


@every_scan
@pytest.mark.parametrize(("read", "retain"), CHOICES)
@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5))
def test_hand_written_gradients_equal_autograd_through_segments(
    scan: Scan, read: str, retain: str, seed: int, chunks: int, chunk: int
) -> None:
    options = RuleOptions(chunk, read, retain)
    length = chunks * chunk
    probe = draw(seed + 1, length, batch=2, heads=2)
    grads = []
    for whole in (True, False):
        data = Data(*(t.requires_grad_() for t in draw(seed, length, batch=2, heads=2)))
        if whole:
            out, new = scan(*data, options)
        else:
            out, state, _ = segments(data, options, [1, length // 2])
            new = state.anchor.unflatten(0, (2, 2))
        loss = (out * probe.xq).sum() + (new * probe.state).sum()
        grads.append(torch.autograd.grad(loss, data, allow_unused=True))
    for name, ours, expected in zip(Data._fields, *grads, strict=True):
        if expected is None:  # base with retain="zero": it only initialises, outside the kernel
            assert name == "base"
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@every_scan
def test_a_second_derivative_fails_instead_of_being_wrong(scan: Scan) -> None:
    data = Data(*(t.requires_grad_() for t in draw(3, 4)))
    out, _ = scan(*data, RuleOptions(2))
    (grad,) = torch.autograd.grad(out.square().sum(), data.xq, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@every_scan
def test_without_gradients_nothing_is_kept(scan: Scan) -> None:
    data = draw(4, 12)
    out, new = scan(*data, RuleOptions(4))
    with torch.no_grad():
        again, same = scan(*(t.requires_grad_() for t in data), RuleOptions(4))
    assert out.grad_fn is None
    assert torch.equal(out, again)
    assert torch.equal(new, same)


@every_scan
@pytest.mark.parametrize("retain", ["start", "zero"])
def test_state_stays_bounded_over_ten_thousand_random_tokens(scan: Scan, retain: str) -> None:
    """From memories as a model starts with, at its slowest retention; float32 as in serving."""
    torch.manual_seed(0)
    dim, heads, tokens = 16, 2, 10_000
    base = torch.zeros(heads, 3 * dim + 2, dim)
    for name in ("k", "v", "mem"):
        base[:, rows(dim)[name]] = torch.eye(dim) + 0.3 * torch.randn(heads, dim, dim)
    x = torch.randn(3, 1, tokens, heads, dim)
    eta, alpha = torch.randn(2, 1, tokens, heads)
    state = (base if retain == "zero" else torch.zeros_like(base))[None]
    norms = []
    for part in range(0, tokens, 1000):
        inputs = [t[:, part : part + 1000] for t in (*x, eta + 1, alpha + 8)]
        # 1000 is no multiple of 32: every part ends with an unfinished chunk, closed here as if it were full.
        out, state = scan(*inputs, base, torch.ones(heads, base.shape[1]), state, RuleOptions(32, retain=retain))
        norms.append(float(state.flatten(2).norm(dim=2).max()))
    assert torch.isfinite(out).all()
    assert max(norms[5:]) < 1.5 * max(norms[:5]), norms
    assert max(norms) < 100, norms


@pytest.mark.xfail(reason="vhat = M v: where a repeated token has v near -k, |M k| grows up to twofold each chunk")
def test_state_stays_bounded_when_one_token_repeats() -> None:
    dim, tokens = 16, 10_000
    base = torch.zeros(1, 3 * dim + 2, dim)
    for name in ("k", "v", "mem"):
        base[:, rows(dim)[name]] = torch.eye(dim)
    rates = torch.full(base.shape[:2], 0.1)
    rates[:, rows(dim)["mem"]] = 1.0
    x = torch.ones(1, tokens, 1, dim)
    gates = torch.ones(1, tokens, 1), torch.full((1, tokens, 1), 8.0)
    _, state = chunk_scan(x, x, -x, *gates, base, rates, torch.zeros_like(base)[None], RuleOptions(32))
    assert state.norm() < 1000


@pytest.mark.parametrize(
    ("options", "named"), [({"chunk": 0}, "chunk"), ({"read": "both"}, "read"), ({"retain": ""}, "retain")]
)
def test_impossible_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named} "):
        RuleOptions(**options)  # type: ignore[arg-type]


def test_rows_tile_the_state() -> None:
    slices = sorted(rows(5).values(), key=lambda s: s.start)
    assert [s.start for s in slices] == [0, *(s.stop for s in slices[:-1])]
    assert slices[-1].stop == 3 * 5 + 2
