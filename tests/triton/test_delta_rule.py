"""The stacked rule and its convolution on ragged batches against the token-by-token reference in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from nested_runtime.core import Batch
from nested_runtime.kernels.delta_rule.layout import RuleOptions
from nested_runtime.kernels.delta_rule.reference import reference_scan
from nested_runtime.kernels.delta_rule.segment import DeltaState, fold
from nested_runtime.kernels.delta_rule.triton import packed_scan
from nested_runtime.kernels.short_conv.reference import short_conv
from nested_runtime.kernels.short_conv.triton import packed_conv
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.self_modifying import SelfModifying

Relative = Callable[[torch.Tensor, torch.Tensor], float]
Spans = list[tuple[int, int, int]]
CHOICES = list(itertools.product(("token", "anchor"), ("start", "zero")))
ALPHA = {"usual": 4.0, "keeps all": 30.0, "forgets all": -30.0, "mixed": 0.0}
SLOTS = 4  # the last belongs to nobody
TOLERANCE = 1e-4
# (session, begin, end) of the texts; session -1 is padding
LENGTHS = (11, 5, 1)
WHOLE: list[Spans] = [[(0, 0, 11), (-1, 0, 3), (1, 0, 5), (2, 0, 1)]]
CUT: list[Spans] = [
    [(0, 0, 3), (1, 0, 1), (-1, 0, 2)],
    [(0, 3, 4), (2, 0, 1), (-1, 0, 1)],
    [(1, 1, 1), (0, 4, 10), (1, 1, 5)],
    [(0, 10, 11)],
]


@dataclass
class Layer:
    """Parameters of a layer and the texts of three sessions, in slots 1 to 3."""

    options: RuleOptions
    device: torch.device
    alpha: str = "usual"
    equal_keys: bool = False
    heads: int = 1
    dim: int = 6
    seed: int = 0
    lengths: tuple[int, ...] = LENGTHS
    texts: list[tuple[torch.Tensor, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g).to(self.device)

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
        pool = {name: torch.zeros(SLOTS + 1, *shape, device=self.device) for name, shape in shapes.items()}
        for tensor in pool.values():
            tensor[SLOTS] = 7.0
        return pool

    def read(self, steps: list[Spans]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Reads of every session and the pool afterwards; padding and the slot nobody uses must stay as they are."""
        pool, reads = self.pool(), [list[torch.Tensor]() for _ in self.lengths]
        for spans in steps:
            pieces = [tuple(t[begin:end] for t in self.texts[max(s, 0)]) for s, begin, end in spans]
            mixed, logits = (torch.cat([p[i] for p in pieces]) for i in (0, 1))
            batch = pack([(s + 1, begin, end - begin) for s, begin, end in spans], self.device)
            out = packed_scan(mixed, logits, self.base, self.rates, pool, batch, self.options)
            assert torch.isfinite(out).all()
            for (s, begin, end), piece in zip(spans, out.split([end - begin for _, begin, end in spans]), strict=True):
                if s >= 0:
                    reads[s].append(piece)
                else:
                    assert not piece.any(), (begin, end)
        for tensor in pool.values():
            assert not tensor[0].any(), "slot 0 must stay zero"
            assert (tensor[SLOTS] == 7.0).all(), "a neighbour's slot was written"
        return [torch.cat(parts) for parts in reads], pool

    def expected(self, session: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads [T, H, K] and the live state [H, R, K] after the whole text, from the equations in float64."""
        mixed, logits = (t.double().cpu() for t in self.texts[session])
        base, rates = self.base.double().cpu(), self.rates.double().cpu()
        outs, lives = [], []
        for h in range(self.heads):
            fresh = base[h] if self.options.retain == "zero" else torch.zeros_like(base[h])
            streams, gates = (mixed[:, i, h] for i in range(3)), (logits[:, i, h] for i in range(2))
            row_rates = torch.cat([rates[h], torch.ones(1)]).repeat_interleave(
                torch.tensor([self.dim, 1, 1, self.dim, self.dim])
            )
            out, live, _ = reference_scan(*streams, *gates, base[h], row_rates, fresh, fresh, 0, self.options)
            outs.append(out)
            lives.append(live - fresh)
        return torch.stack(outs, 1), torch.stack(lives)

    def live(self, pool: dict[str, torch.Tensor], session: int) -> torch.Tensor:
        """The session's deviation from the start: its anchor with the unfinished tail folded in."""
        done = self.lengths[session] % self.options.chunk
        state = DeltaState(*(pool[name][session + 1].double().cpu() for name in DeltaState._fields))
        assert not any(tensor[:, done:].any() for tensor in state[1:]), "rows from the tail's end on must stay zero"
        if not done:
            return state.anchor
        shift = self.base.double().cpu() if self.options.retain == "zero" else 0.0
        tail = (t[:, :done] for t in state[1:])
        return fold(DeltaState(state.anchor + shift, *tail)).anchor - shift


def pack(spans: list[tuple[int, int, int]], device: torch.device) -> Batch:
    """A batch of (slot, position, tokens)."""
    slots, positions, counts = zip(*spans, strict=True)
    ends = list(itertools.accumulate(counts, initial=0))
    return Batch(
        token_ids=torch.zeros(ends[-1], dtype=torch.int64, device=device),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device),
        slots=torch.tensor(slots, dtype=torch.int32, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
    )


def check(layer: Layer, steps: list[Spans], relative: Relative) -> None:
    reads, pool = layer.read(steps)
    for session, found in enumerate(reads):
        out, live = layer.expected(session)
        assert relative(found, out) <= TOLERANCE
        assert relative(layer.live(pool, session), live) <= TOLERANCE


@pytest.mark.parametrize(("read", "retain"), CHOICES)
def test_scan_equals_the_reference(read: str, retain: str, device: torch.device, relative: Relative) -> None:
    check(Layer(RuleOptions(4, read, retain), device, heads=2), CUT, relative)


@pytest.mark.parametrize(("alpha", "retain"), [("keeps all", "zero"), ("forgets all", "start"), ("mixed", "zero")])
def test_scan_at_the_ends_of_retention(alpha: str, retain: str, device: torch.device, relative: Relative) -> None:
    check(Layer(RuleOptions(4, retain=retain), device, alpha), CUT, relative)


def test_scan_of_near_equal_keys(device: torch.device, relative: Relative) -> None:
    check(Layer(RuleOptions(8), device, "keeps all", equal_keys=True), WHOLE, relative)


@pytest.mark.parametrize(("dim", "chunk"), [(64, 32), (72, 64), (20, 1)])
def test_scan_of_other_shapes(dim: int, chunk: int, device: torch.device, relative: Relative) -> None:
    layer = Layer(RuleOptions(chunk), device, dim=dim, lengths=(max(9, chunk + 6), 3, 1))
    last = layer.lengths[0] - 1
    check(layer, [[(0, 0, last), (1, 0, 3)], [(0, last, last + 1), (2, 0, 1)]], relative)


def test_a_sequence_is_read_alike_whatever_its_companions(device: torch.device) -> None:
    layer = Layer(RuleOptions(4), device)
    reads, together = layer.read([[(0, 0, 10), (1, 0, 1), (2, 0, 1)], [(1, 1, 5), (0, 10, 11)]])
    same, alone = layer.read([[(2, 0, 1)], [(0, 0, 10)], [(0, 10, 11)], [(1, 0, 1)], [(1, 1, 5)]])
    assert all(torch.equal(a, b) for a, b in zip(reads, same, strict=True))
    for name, tensor in together.items():
        assert torch.equal(tensor, alone[name]), name


def test_slots_may_lie_apart(device: torch.device) -> None:
    """vLLM's cache interleaves the tensors of a slot, so the stride between slots is larger than a tensor."""
    layer = Layer(RuleOptions(4), device)
    _, expected = layer.read(WHOLE)
    wide = {name: torch.full((SLOTS + 1, t[0].numel() + 5), 7.0, device=device) for name, t in expected.items()}
    views = {n: wide[n][:, : t[0].numel()].unflatten(1, t.shape[1:]) for n, t in expected.items()}
    for view in views.values():
        view[:SLOTS] = 0.0
    layer.pool = lambda: views  # type: ignore[method-assign]
    _, found = layer.read(WHOLE)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
        assert (wide[name][:, -5:] == 7.0).all()


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_equals_the_reference(
    width: int, device: torch.device, normal: Callable[..., torch.Tensor], relative: Relative
) -> None:
    weight, texts = normal(width, 150), [normal(n, 150) for n in LENGTHS]
    pool = torch.zeros(SLOTS + 1, width - 1, 150, device=device)
    pool[SLOTS] = 7.0
    reads = [list[torch.Tensor]() for _ in texts]
    for spans in CUT:
        x = torch.cat([texts[max(s, 0)][begin:end] for s, begin, end in spans])
        out = packed_conv(x, pool, weight, pack([(s + 1, begin, end - begin) for s, begin, end in spans], device))
        assert torch.isfinite(out).all()
        for (s, _, _), piece in zip(spans, out.split([end - begin for _, begin, end in spans]), strict=True):
            if s >= 0:
                reads[s].append(piece)
            else:
                assert not piece.any()
    assert not pool[0].any()
    assert (pool[SLOTS] == 7.0).all()
    for s, text in enumerate(texts):
        window = torch.zeros(1, width - 1, 150, dtype=torch.float64)
        expected, carried = short_conv(text[None].double().cpu(), window, weight.double().cpu())
        assert relative(torch.cat(reads[s]), expected[0]) <= 1e-6
        assert torch.equal(pool[s + 1].cpu(), carried[0].float())


def test_a_layer_serves_the_same_with_these_kernels(
    device: torch.device, normal: Callable[..., torch.Tensor], relative: Relative, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nested_runtime.kernels.dispatch import Kernels

    kernels = Kernels("triton", packed_conv, packed_scan)
    monkeypatch.setattr("nested_runtime.memory.self_modifying.packed_kernels", lambda *_: kernels)
    torch.manual_seed(11)
    module = SelfModifying(12, 2, 6, RuleOptions(4)).to(device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    pools = [{s.name: torch.zeros(4, *s.shape, device=device) for s in module.state()} for _ in range(2)]
    with torch.inference_mode():
        for spans in ([(1, 0, 5), (0, 0, 2), (2, 0, 1)], [(2, 1, 1), (1, 5, 1)], [(1, 6, 2), (2, 2, 5)]):
            x = normal(sum(n for _, _, n in spans), 12)
            found = module.apply_packed(x, pools[0], pack(spans, device))
            assert relative(found, UpdateRule.apply_packed(module, x, pools[1], pack(spans, device))) <= TOLERANCE
    for name, tensor in pools[0].items():
        assert relative(tensor, pools[1][name]) <= TOLERANCE
