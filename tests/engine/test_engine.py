"""Engine: how sequences end, fail, fork and are refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from nested_runtime.core import FinishReason, SamplingParams, Sequence, TokenEvent
from nested_runtime.engine.engine import Engine
from nested_runtime.errors import Overloaded, RequestError, StateError, UpdateDiverged
from nested_runtime.state.snapshot import state_digest

POISON, CRASH = 38, 39


def ask(name: str, prompt: list[int], **fields: Any) -> Sequence:
    names = set(SamplingParams.__dataclass_fields__)
    params = SamplingParams(
        **{"max_tokens": 6, "temperature": 0.0, **{key: value for key, value in fields.items() if key in names}}
    )
    return Sequence(name, prompt, params, **{key: value for key, value in fields.items() if key not in names})


def run(engine: Engine) -> dict[str, list[TokenEvent]]:
    """All events to the end, by sequence; the pool must be clean after it."""
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.sequence_id, []).append(event)
    engine.pool.check_integrity(deep=True)
    assert engine.pool.num_free == engine.pool.capacity
    return events


def solo(model: Any, prompt: list[int], **fields: Any) -> list[TokenEvent]:
    engine = Engine(model, capacity=1)
    engine.submit(ask("solo", prompt, **fields))
    return run(engine)["solo"]


def tokens(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def states_equal(first: Any, second: Any) -> bool:
    return all(torch.allclose(first[name].double(), second[name].double(), rtol=0, atol=1e-10) for name in first)


def test_length_end_token_and_stop_token(counter: Any) -> None:
    reply = tokens(solo(counter, [1, 2, 3], max_tokens=12))
    assert len(reply) == 12
    end = next(token for token in reply if reply.index(token) >= 2)
    cut = reply.index(end) + 1
    engine = Engine(counter, end_tokens=[end])
    engine.submit(ask("end", [1, 2, 3], max_tokens=12))
    engine.submit(ask("ignore", [1, 2, 3], max_tokens=12, ignore_eos=True))
    engine.submit(ask("stop id", [1, 2, 3], max_tokens=12, ignore_eos=True, stop_token_ids=(reply[0],)))
    engine.submit(ask("min", [1, 2, 3], max_tokens=20, min_tokens=cut + 1))
    events = run(engine)
    assert tokens(events["end"]) == reply[:cut]
    assert tokens(events["ignore"]) == reply
    assert tokens(events["stop id"]) == reply[:1]
    assert end not in tokens(events["min"])[: cut + 1]
    assert [events[name][-1].finish for name in ("end", "ignore", "stop id")] == [
        FinishReason.STOP,
        FinishReason.LENGTH,
        FinishReason.STOP,
    ]


def test_result_holds_all_tokens_but_the_last(counter: Any) -> None:
    prompt = [1, 2, 3, 4, 5]
    sequence = ask("a", prompt, keep_state=True)
    engine = Engine(counter)
    engine.submit(sequence)
    result = run(engine)["a"][-1].result
    assert result is not None
    assert (result.position, result.pending) == (5 + 5, sequence.output[-1])
    read = solo(counter, sequence.tokens[:-1], max_tokens=0, keep_state=True)[-1].result
    assert read is not None
    assert (read.position, read.pending) == (10, None)
    assert states_equal(result.state, read.state)
    assert sequence.slot == 0


def test_state_at_the_prompt(counter: Any) -> None:
    result = solo(counter, [1, 2, 3, 4, 5], keep_state_at_prompt=True, position=7)[-1].result
    read = solo(counter, [1, 2, 3, 4, 5], max_tokens=0, keep_state=True, position=7)[-1].result
    assert result is not None
    assert read is not None
    assert (result.position, result.pending) == (12, None)
    assert states_equal(result.state, read.state)


def test_no_state_is_returned_unless_asked_for(counter: Any) -> None:
    assert solo(counter, [1, 2])[-1].result is None


def test_abort_waiting_running_and_unknown(counter: Any) -> None:
    engine = Engine(counter, capacity=1)
    engine.submit(ask("running", [1], max_tokens=100, keep_state=True))
    engine.submit(ask("waiting", [2], keep_state=True))
    engine.step()
    engine.abort("running")
    engine.pool.check_integrity(deep=True)
    engine.abort("waiting")
    engine.abort("nobody")
    events = run(engine)
    for name in ("running", "waiting"):
        assert (events[name][-1].finish, events[name][-1].result) == (FinishReason.ABORT, None)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_finish_returns_the_state(counter: Any, steps: int) -> None:
    engine = Engine(counter, max_batch_tokens=8)
    sequence = ask("a", list(range(1, 20)), max_tokens=100, keep_state=True)
    engine.submit(sequence)
    for _ in range(steps):
        engine.step()
    engine.finish("a")
    engine.finish("nobody")
    last = run(engine)["a"][-1]
    assert (last.finish, last.token) == (FinishReason.STOP, None)
    assert last.result is not None
    assert last.result.position == len(sequence.prompt) + max(len(sequence.output) - 1, 0)
    assert last.result.pending == (sequence.output[-1] if sequence.output else None)


def test_stop_check_decides_inside_the_step(counter: Any) -> None:
    seen: list[int] = []

    def third(token: int) -> bool:
        seen.append(token)
        return len(seen) == 3

    last = solo(counter, [4, 4], max_tokens=50, stop_check=third, keep_state=True)[-1]
    assert (last.finish, last.token, last.result is not None) == (FinishReason.STOP, seen[-1], True)
    assert last.result is not None
    assert (last.result.position, last.result.pending) == (4, seen[-1])


def test_failing_stop_check_fails_its_sequence_alone(counter: Any) -> None:
    def fail(token: int) -> bool:
        raise ValueError("detokenizer")

    engine = Engine(counter)
    engine.submit(ask("bad", [1, 2], stop_check=fail))
    engine.submit(ask("good", [1, 2]))
    events = run(engine)
    assert isinstance(events["bad"][-1].error, ValueError)
    assert tokens(events["good"]) == tokens(solo(counter, [1, 2]))


@pytest.mark.parametrize("keep", ["keep_state", "keep_state_at_prompt"])
def test_non_finite_sequence_fails_alone(counter: Any, keep: str) -> None:
    expected = tokens(solo(counter, [1, 2, 3]))
    counter.poison = POISON
    engine = Engine(counter)
    engine.submit(ask("good", [1, 2, 3]))
    engine.submit(ask("bad", [1, POISON, 3], **{keep: True}))
    events = run(engine)
    assert tokens(events["good"]) == expected
    (last,) = events["bad"]
    assert (last.finish, last.result) == (FinishReason.ERROR, None)
    assert isinstance(last.error, UpdateDiverged)


@pytest.mark.parametrize("keep", ["keep_state", "keep_state_at_prompt"])
def test_non_finite_state_never_leaves(counter: Any, keep: str) -> None:
    """A state can be broken where the model does not read it yet."""

    def ruin(module: Any, args: tuple[Any, Any], output: torch.Tensor) -> None:
        batch, pool = args
        for slot, position in zip(batch.slots.tolist(), batch.positions.tolist(), strict=True):
            if position >= 100:
                pool["anchor"][slot] = float("inf")

    counter.register_forward_hook(ruin)
    engine = Engine(counter)
    engine.submit(ask("bad", [1, 2, 3], max_tokens=1, position=100, **{keep: True}))
    engine.submit(ask("good", [1, 2, 3], max_tokens=1, **{keep: True}))
    events = run(engine)
    assert isinstance(events["bad"][-1].error, UpdateDiverged)
    assert events["bad"][-1].result is None
    assert events["good"][-1].result is not None


def test_model_exception_fails_the_step_and_the_engine_goes_on(counter: Any) -> None:
    counter.crash = CRASH
    engine = Engine(counter)
    engine.submit(ask("bad", [1, CRASH]))
    events = run(engine)
    assert isinstance(events["bad"][-1].error, RuntimeError)
    engine.submit(ask("after", [1, 2]))
    assert len(tokens(run(engine)["after"])) == 6


def test_fork_reads_the_prompt_once(counter: Any) -> None:
    prompt = list(range(1, 31))
    engine = Engine(counter, capacity=2)
    for index in range(4):
        fork_of = "0" if index else None
        engine.submit(
            ask(str(index), prompt, temperature=1.0, seed=index, fork_of=fork_of, keep_state=True, prompt_logprobs=0)
        )
    events = run(engine)
    counts = Counter({"prompt": engine.stats()["prompt_tokens"]})
    assert counts["prompt"] == len(prompt) + 3
    for index in range(4):
        alone = solo(counter, prompt, temperature=1.0, seed=index, keep_state=True, prompt_logprobs=0)
        assert tokens(events[str(index)]) == tokens(alone)
        mine, other = events[str(index)][-1].result, alone[-1].result
        assert mine is not None
        assert other is not None
        assert states_equal(mine.state, other.state)
        found, expected = events[str(index)][0].prompt_logprobs, alone[0].prompt_logprobs
        assert found is not None
        assert expected is not None
        assert [p and round(p.logprob, 5) for p in found] == [p and round(p.logprob, 5) for p in expected]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_forks_outlive_their_leader(counter: Any, steps: int) -> None:
    prompt = list(range(1, 31))
    engine = Engine(counter, capacity=2, max_batch_tokens=16)
    engine.submit(ask("0", prompt))
    engine.submit(ask("1", prompt, fork_of="0"))
    engine.submit(ask("2", prompt, fork_of="1"))
    engine.submit(ask("3", prompt, fork_of="0"))
    for _ in range(steps):
        engine.step()
    engine.abort("0")
    engine.abort("1")
    events = run(engine)
    expected = tokens(solo(counter, prompt))
    assert tokens(events["2"]) == tokens(events["3"]) == expected


def test_fork_of_something_else_just_runs(counter: Any) -> None:
    engine = Engine(counter)
    engine.submit(ask("0", [1, 2, 3]))
    engine.submit(ask("1", [3, 2, 1], fork_of="0"))
    engine.submit(ask("2", [1, 2, 3], fork_of="gone"))
    engine.submit(ask("3", [1, 2, 3], position=9, fork_of="0"))
    events = run(engine)
    assert tokens(events["1"]) == tokens(solo(counter, [3, 2, 1]))
    assert tokens(events["2"]) == tokens(solo(counter, [1, 2, 3]))
    assert tokens(events["3"]) == tokens(solo(counter, [1, 2, 3], position=9))


def test_prompt_logprobs_do_not_depend_on_the_split(counter: Any) -> None:
    prompt = list(range(1, 31))
    whole = solo(counter, prompt, prompt_logprobs=2, max_tokens=0)[-1]
    engine = Engine(counter, max_batch_tokens=7)
    engine.submit(ask("a", prompt, prompt_logprobs=2, max_tokens=0))
    engine.submit(ask("b", prompt))
    (split,) = run(engine)["a"]
    assert whole.prompt_logprobs is not None
    assert split.prompt_logprobs is not None
    assert len(whole.prompt_logprobs) == len(prompt)
    assert whole.prompt_logprobs[0] is None
    for found, expected, token in zip(split.prompt_logprobs[1:], whole.prompt_logprobs[1:], prompt[1:], strict=True):
        assert found is not None
        assert expected is not None
        assert found.token == token
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert len(found.top) == 2


def test_logprobs_come_with_every_token(counter: Any) -> None:
    for event in solo(counter, [1, 2], logprobs=3):
        assert event.logprobs is not None
        assert event.logprobs.token == event.token
        assert event.logprobs.top[0] == (event.token, event.logprobs.logprob)


def test_a_memoryless_reply_is_the_same_before_and_after_traffic(build_model: Any) -> None:
    """P1, on the bits: nothing of other sequences stays behind."""
    engine = Engine(build_model("hope", torch.float32), capacity=3)
    outcomes = []
    for _ in range(3):
        engine.submit(ask("probe", [5, 6, 7], max_tokens=20, keep_state=True))
        last = run(engine)["probe"][-1]
        assert last.result is not None
        outcomes.append(state_digest(last.result.state))
        for index in range(5):
            engine.submit(ask(f"traffic {index}", [index] * 40, temperature=1.0, keep_state=True))
        for _ in range(3):
            engine.step()
        engine.abort("traffic 1")
        run(engine)
    assert len(set(outcomes)) == 1


def test_queue_limit_counts_free_slots(counter: Any) -> None:
    engine = Engine(counter, capacity=2, max_queue=1)
    for index in range(3):
        engine.submit(ask(str(index), [1]))
    with pytest.raises(Overloaded, match="1 sequences wait"):
        engine.submit(ask("3", [1]))
    assert len(run(engine)) == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [40]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"position": -1}, "position"),
        ({"temperature": -1.0}, "temperature"),
        ({"output": [1]}, "id"),
        ({"name": "taken"}, "id"),
    ],
)
def test_wrong_sequences_are_refused(counter: Any, fields: dict[str, Any], param: str) -> None:
    engine = Engine(counter)
    engine.submit(ask("taken", [1]))
    with pytest.raises(RequestError) as caught:
        engine.submit(ask(**{"name": "new", "prompt": [1], **fields}))
    assert caught.value.param == param
    assert list(run(engine)) == ["taken"]


def test_state_of_another_shape_is_refused(counter: Any) -> None:
    with pytest.raises(StateError, match="missing"):
        Engine(counter).submit(ask("a", [1], state={"live": torch.zeros(8)}))


def test_warm_up_leaves_no_trace(counter: Any) -> None:
    engine = Engine(counter)
    engine.warm_up()
    assert engine.stats()["sampled_tokens"] == engine.stats()["steps"] == 0
    counter.crash = 0
    with pytest.raises(RuntimeError, match="the model failed"):
        engine.warm_up()
