"""Prefix cache: saves reading, changes nothing, crosses no tenant, stays bounded."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_runtime.core import SamplingParams, Sequence
from nested_runtime.engine.engine import Engine
from nested_runtime.engine.prefix import PrefixCache

SYSTEM = [token % 37 for token in range(200)]


def ask(name: str, prompt: list[int], tenant: str = "t", start: str = "fresh", **fields: Any) -> Sequence:
    params = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=fields.pop("prompt_logprobs", None))
    return Sequence(name, prompt, params, keep_state=True, cache_key=(tenant, start), **fields)


def run(engine: Engine, sequence: Sequence) -> tuple[list[int], dict[str, torch.Tensor], int]:
    """(reply, state, prompt tokens read)."""
    before = engine.stats()["prompt_tokens"]
    engine.submit(sequence)
    result = None
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            result = event.result
    assert result is not None
    engine.pool.check_integrity(deep=True)
    return sequence.output, dict(result.state), engine.stats()["prompt_tokens"] - before


def cached_engine(model: Any, num_bytes: int = 1 << 24) -> Engine:
    return Engine(model, prefix_cache_bytes=num_bytes)


def test_shared_system_prompt_is_read_once(counter: Any) -> None:
    engine = cached_engine(counter)
    first, second = SYSTEM + [1, 2, 3] * 20, [*SYSTEM, 4, 5]
    assert run(engine, ask("1", first, cache_points=(len(SYSTEM),)))[2] == len(first)
    reply, state, num_read = run(engine, ask("2", second, cache_points=(len(SYSTEM),)))
    assert num_read == len(second) - 192  # the last boundary of 16 within the system prompt
    plain_reply, plain_state, _ = run(Engine(counter), ask("plain", second))
    assert reply == plain_reply
    assert all(torch.allclose(state[name], plain_state[name], rtol=0, atol=1e-12) for name in state)


def test_same_prompt_again_reads_only_its_end_and_gives_the_same_bits(counter: Any) -> None:
    engine = cached_engine(counter)
    reply, state, _ = run(engine, ask("1", SYSTEM))
    again, same_state, num_read = run(engine, ask("2", SYSTEM))
    assert num_read == len(SYSTEM) - 192
    assert again == reply
    assert all(torch.equal(state[name], same_state[name]) for name in state)
    stats = engine.stats()
    assert (stats["prefix_queries"], stats["prefix_hits"], stats["prefix_hit_tokens"]) == (2, 1, 192)


def test_other_tenants_starts_positions_and_tokens_share_nothing(counter: Any) -> None:
    engine = cached_engine(counter)
    run(engine, ask("1", SYSTEM))
    other = [SYSTEM[0] + 1, *SYSTEM[1:]]
    for sequence in (
        ask("tenant", SYSTEM, tenant="u"),
        ask("start", SYSTEM, start="session 1"),
        ask("position", SYSTEM, position=16),
        ask("tokens", other),
    ):
        assert run(engine, sequence)[2] == len(SYSTEM)


def test_off_without_key_without_bytes_and_for_prompt_logprobs(counter: Any) -> None:
    engine = cached_engine(counter)
    run(engine, ask("1", SYSTEM))
    plain = ask("2", SYSTEM)
    plain.cache_key = None
    assert run(engine, plain)[2] == len(SYSTEM)
    assert run(engine, ask("3", SYSTEM, prompt_logprobs=0))[2] == len(SYSTEM)
    off = Engine(counter)
    run(off, ask("1", SYSTEM))
    assert run(off, ask("2", SYSTEM))[2] == len(SYSTEM)
    assert off.stats()["prefix_bytes"] == 0


def test_bounded_and_forgotten_by_tenant_and_session(counter: Any) -> None:
    one_state = sum(spec.num_bytes for spec in Engine(counter).specs)
    engine = cached_engine(counter, 3 * one_state)
    for index in range(5):
        run(engine, ask(str(index), [index] * 100, tenant=f"t{index % 2}"))
        assert engine.stats()["prefix_bytes"] <= 3 * one_state
    engine.forget_prefixes(("t0", "fresh"))
    assert engine.stats()["prefix_bytes"] == one_state
    engine.forget_prefixes(("t1",))
    assert engine.stats()["prefix_bytes"] == 0


@settings(max_examples=100, deadline=None)
@given(shared=st.integers(2000, 60_000), chunk=st.sampled_from([1, 4, 24, 32]))
def test_a_shared_prefix_without_marks_costs_a_tenth(shared: int, chunk: int) -> None:
    cache = PrefixCache(chunk, 1)
    first = ask("a", [1] * (shared + 100))
    points = cache.points(first, cache.keys(first))
    assert max(point for point in points if point <= shared) >= 0.9 * shared
    assert len(points) <= 16 * (shared + 100).bit_length()


def test_a_session_shares_its_beginning_only(counter: Any) -> None:
    engine = cached_engine(counter)
    run(engine, ask("1", [*SYSTEM, *range(30)], cache_points=(150,), cache_upto=150))
    assert run(engine, ask("2", [*SYSTEM, *range(30)]))[2] == len(SYSTEM) + 30 - 144


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 900),
    position=st.integers(0, 100),
    chunk=st.sampled_from([1, 4, 24, 32]),
    wanted=st.lists(st.integers(-5, 1000), max_size=4),
)
def test_points_are_few_and_on_boundaries(length: int, position: int, chunk: int, wanted: list[int]) -> None:
    cache = PrefixCache(chunk, 1)
    sequence = ask("a", [1] * length, position=position, cache_points=tuple(wanted))
    keys = cache.keys(sequence)
    points = cache.points(sequence, keys)
    assert len(set(keys.values())) == len(keys)
    assert set(points) <= set(keys)
    assert all(0 < point < length and (position + point) % chunk == 0 for point in points)
    assert len(points) <= 1 + length // 128 + len(wanted)
    assert not keys or max(keys) in points


def own(session: str, digest: str, prompt: list[int], **fields: Any) -> Sequence:
    sequence = ask(f"{session}-{digest}", prompt, **fields)
    sequence.cache_key, sequence.cache_own = None, ("t", session, digest)
    return sequence


def test_a_turn_again_from_the_same_start_reads_one_token(counter: Any) -> None:
    engine = cached_engine(counter)
    question = SYSTEM[:77]
    reply, state, num_read = run(engine, own("s", "v1", question))
    assert num_read == len(question)
    again, same_state, num_read = run(engine, own("s", "v1", question))
    assert num_read == 1
    assert again == reply
    assert all(torch.equal(state[name], same_state[name]) for name in state)
    plain_reply, plain_state, _ = run(Engine(counter), ask("plain", question))
    assert reply == plain_reply
    assert all(torch.allclose(state[name], plain_state[name], rtol=0, atol=1e-12) for name in state)


def test_own_prefixes_are_of_one_session_and_one_start(counter: Any) -> None:
    engine = cached_engine(counter)
    question = SYSTEM[:77]
    run(engine, own("s", "v1", question))
    for sequence in (
        own("u", "v1", question),
        own("s", "v2", question),
        own("s", "v1", question, position=16),
        own("s", "v1", [*question[:-2], 36, question[-1]]),
        ask("memoryless", question),
    ):
        assert run(engine, sequence)[2] == len(question)
    engine.forget_prefixes(("t", "s"))
    assert run(engine, own("u", "v1", question))[2] == 1
    assert run(engine, own("s", "v1", question))[2] == len(question)


def test_an_edited_last_message_finds_what_came_before_it(counter: Any) -> None:
    engine = cached_engine(counter)
    run(engine, own("s", "v1", [*SYSTEM, *range(30)], cache_points=(len(SYSTEM),)))
    assert run(engine, own("s", "v1", [*SYSTEM, *range(20)], cache_points=(len(SYSTEM),)))[2] == len(SYSTEM) + 20 - 192


def test_a_new_session_files_its_beginning_with_the_tenant_and_the_rest_with_itself(counter: Any) -> None:
    cache = PrefixCache(counter.chunk, 1)
    sequence = ask("a", [*SYSTEM, *range(30)], cache_points=(len(SYSTEM),), cache_upto=len(SYSTEM))
    sequence.cache_own = ("t", "s", "")
    keys = cache.keys(sequence)
    assert cache.points(sequence, keys) == [128, 192, len(SYSTEM) + 29]
    assert {length: key[:-2] for length, key in keys.items()} == {
        length: ("t", "fresh") if length <= len(SYSTEM) else ("t", "s", "") for length in keys
    }


def test_a_state_over_the_limit_drives_out_nothing(counter: Any) -> None:
    one_state = sum(spec.num_bytes for spec in Engine(counter).specs)
    states = PrefixCache(counter.chunk, one_state).states
    states.put(("a",), {"x": torch.zeros(one_state // 8, dtype=torch.float64)})
    states.put(("b",), {"x": torch.zeros(one_state // 8 + 1, dtype=torch.float64)})
    assert list(states) == [("a",)]
