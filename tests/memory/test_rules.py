"""The contract of every registered update rule."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_runtime.core import Batch
from nested_runtime.memory.base import UpdateRule
from nested_runtime.memory.deep import DeepSelfModifying
from nested_runtime.memory.self_modifying import SelfModifying
from nested_runtime.registry import RULES

EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
EXACT = {"rtol": 0.0, "atol": 1e-10}
DIM = 8
Tensors = Mapping[str, torch.Tensor]


def stream(seed: int, batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(rule: UpdateRule, batch: int) -> dict[str, torch.Tensor]:
    return {s.name: torch.zeros(batch, *s.shape, dtype=torch.float64) for s in rule.state()}


def read(rule: UpdateRule, x: torch.Tensor, cuts: list[int], position: int = 0) -> tuple[torch.Tensor, Tensors]:
    """Outputs and state of a fresh session that reads x in pieces ending at `cuts`."""
    state, begin, outs = fresh(rule, x.shape[0]), 0, []
    for end in sorted({*cuts, x.shape[1]}):
        out, state = rule.scan(x[:, begin:end], state, position + begin)
        outs.append(out)
        begin = end
    return torch.cat(outs, dim=1), state


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def pack(lengths: list[int], slots: list[int], positions: list[int]) -> Batch:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = torch.zeros(sum(lengths), dtype=torch.int64)
    return Batch(tokens, ends, torch.tensor(slots, dtype=torch.int32), torch.tensor(positions))


def test_every_registered_rule_is_tested_here(tested_rules: set[str]) -> None:
    assert tested_rules == set(RULES)


def test_state_matches_its_spec(rule: UpdateRule) -> None:
    _, state = rule.scan(stream(0, 3, 6), fresh(rule, 3), 0)
    assert {name: tuple(t.shape[1:]) for name, t in state.items()} == {s.name: s.shape for s in rule.state()}
    assert all(t.shape[0] == 3 and t.dtype == torch.float64 for t in state.values())


def test_scan_is_pure(rule: UpdateRule) -> None:
    x = stream(1, 2, 7)
    _, state = rule.scan(x, fresh(rule, 2), 0)
    before = {name: t.clone() for name, t in state.items()}
    rule.scan(x, state, 7)
    assert all(torch.equal(t, before[name]) for name, t in state.items())


def test_what_was_read_changes_what_is_read(rule: UpdateRule) -> None:
    x = stream(2, 1, 9)
    for name, tensor in read(rule, x, [])[1].items():
        assert tensor.any(), f"{name} did not change"
    assert (read(rule, x, [])[0][:, 3:] - read(rule, x[:, 3:], [])[0]).abs().max() > 1e-3


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 15), st.data())
def test_any_split_gives_the_same_outputs_and_state(
    rule: UpdateRule, seed: int, length: int, data: st.DataObject
) -> None:
    x = stream(seed, 2, length)
    out, state = read(rule, x, data.draw(st.lists(st.integers(1, length)), "cuts"))
    expected, whole = read(rule, x, [])
    torch.testing.assert_close(out, expected, **EXACT)
    assert_same(state, whole)


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(0, 3))
def test_all_zeros_is_a_fresh_session_at_any_chunk_boundary(rule: UpdateRule, seed: int, chunks: int) -> None:
    """The trainer zeroes a lane's state when its session ends, wherever the lane's clock stands (here lcm 20)."""
    x = stream(seed, 1, 11)
    moved, _ = read(rule, x, [4], position=20 * chunks)
    torch.testing.assert_close(moved, read(rule, x, [])[0], **EXACT)


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_no_output_depends_on_a_later_token(rule: UpdateRule, seed: int, at: int) -> None:
    x = stream(seed, 1, 13)
    changed = x.clone()
    changed[:, at:] += 1
    torch.testing.assert_close(read(rule, x, [])[0][:, :at], read(rule, changed, [])[0][:, :at], **EXACT)


@EXAMPLES
@given(st.integers(0, 2**31), st.data())
def test_companions_in_a_scan_change_nothing(rule: UpdateRule, seed: int, data: st.DataObject) -> None:
    x = stream(seed, 3, data.draw(st.integers(1, 10), "length"))
    out, state = read(rule, x, [])
    for b in range(3):
        alone, own = read(rule, x[b : b + 1], [])
        torch.testing.assert_close(alone, out[b : b + 1], **EXACT)
        assert_same(own, {name: t[b : b + 1] for name, t in state.items()})


@EXAMPLES
@given(st.data())
@torch.no_grad()  # serving: here a rule's kernels run
def test_packed_batches_equal_scans(rule: UpdateRule, data: st.DataObject) -> None:
    """Sessions in slots of a pool, read in packed steps with padding among them."""
    lengths = data.draw(st.lists(st.integers(1, 10), min_size=1, max_size=3), "lengths")
    texts = [stream(i, 1, n) for i, n in enumerate(lengths)]
    slots = data.draw(st.permutations(range(1, 5)), "slots")[: len(texts)]
    pool = fresh(rule, 5)
    done, outs = [0] * len(texts), [[] for _ in texts]
    while left := [i for i, n in enumerate(lengths) if done[i] < n]:
        # Who reads nothing in this step still stands in the batch; the last entry is padding.
        first = data.draw(st.sampled_from(left), "first")
        counts = [data.draw(st.integers(int(i == first), n - done[i]), "count") for i, n in enumerate(lengths)]
        padding = data.draw(st.integers(0, 2), "padding")
        pieces = [t[0, d : d + c] for t, d, c in zip(texts, done, counts, strict=True)]
        x = torch.cat([*pieces, torch.ones(padding, DIM, dtype=torch.float64)])
        out = rule.apply_packed(x, pool, pack([*counts, padding], [*slots, 0], [*done, 0]))
        for i, piece in enumerate(torch.split(out, [*counts, padding])[:-1]):
            outs[i].append(piece)
            done[i] += counts[i]
    for slot, text, parts in zip(slots, texts, outs, strict=True):
        expected, state = read(rule, text, [])
        torch.testing.assert_close(torch.cat(parts)[None], expected, **EXACT)
        assert_same({name: t[slot : slot + 1] for name, t in pool.items()}, state)
    untouched = sorted(set(range(5)) - set(slots))
    assert not any(t[untouched].any() for t in pool.values()), "padding or free slots were written"


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 14))
def test_the_memory_is_what_the_state_has_learned(rule: UpdateRule, seed: int, length: int) -> None:
    """Nothing when fresh; then what the equations say, wherever in a chunk the reading stopped."""
    assert not any(tensor.any() for tensor in rule.memory(fresh(rule, 2)).values())
    _, state = read(rule, stream(seed, 2, length), [])
    found = rule.memory(state)
    assert found.keys() <= state.keys()
    assert all(tensor.any() for tensor in found.values())
    if isinstance(rule, DeepSelfModifying):
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    if not isinstance(rule, SelfModifying) or "tail_g" not in state:
        return
    start = rule.base if rule.options.retain == "zero" else torch.zeros_like(rule.base)
    expected, num_tail = state["anchor"] + start, length % rule.options.chunk
    for j in range(num_tail):  # X_j = alpha_j X_{j-1} + d_j k_j^T, alpha_j from the cumulated logarithms
        before = state["tail_g"][:, :, j - 1] if j else torch.zeros_like(state["tail_g"][:, :, 0])
        alpha = (state["tail_g"][:, :, j] - before).exp()[..., None, None]
        written = state["tail_d"][:, :, j, :, None] * state["tail_k"][:, :, j, None]
        expected = alpha * expected + written
    torch.testing.assert_close(found["anchor"], expected - start, **EXACT)


def test_training_and_serving_agree_when_autograd_records(rule: UpdateRule) -> None:
    """A kernel without a backward may not run while gradients are wanted."""
    x = stream(5, 1, 9)[0]
    rule.requires_grad_(True)
    out = rule.apply_packed(x, fresh(rule, 2), pack([9], [1], [0]))
    torch.testing.assert_close(out.detach()[None], read(rule, x[None], [])[0].detach(), **EXACT)


def test_scan_carries_gradients_to_every_parameter_and_the_start_state(rule: UpdateRule) -> None:
    rule.requires_grad_(True)
    x = stream(4, 2, 10)
    start = {name: t.requires_grad_() for name, t in rule.scan(x, fresh(rule, 2), 0)[1].items()}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in start.items() if name != "filled"}
    out, _ = rule.scan(x, {**start, **leaves}, 10)
    out.square().sum().backward()
    tensors = dict(rule.named_parameters()) | leaves
    idle = {name for name, t in tensors.items() if t.grad is None or not t.grad.any()}
    assert not idle
