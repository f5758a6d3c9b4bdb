"""The same tokens and the same memories from vLLM as from our own engine: a state depends on what was read alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from nested_runtime.core import FinishReason, Sequence
from nested_runtime.errors import ContextOverflow, RequestError, StateError

LENGTHS = (1, 2, 31, 32, 33, 64, 127, 128, 200, 333)
TOLD = {  # and how it is asked for
    "My dog is called Rex.": "What is my dog called?",
    "I live in Lisbon.": "Where do I live?",
    "My sister is called Ada.": "What is my sister called?",
    "My favourite food is soup.": "What is my favourite food?",
    "I work as a tailor.": "What is my job?",
    "My cat is called Nox.": "What is my cat called?",
}


def both(native: Any, vllm: Any, sequences: list[Sequence]) -> list[tuple[Any, Any]]:
    """Replies of both engines to equal sequences, all of them running side by side."""
    ours = native.run(*(replace(s, output=[], id=f"native-{s.id}") for s in sequences))
    theirs = vllm.run(*(replace(s, output=[], id=f"vllm-{s.id}") for s in sequences))
    return list(zip(ours, theirs, strict=True))


def equal(ours: Any, theirs: Any, same_state: Any) -> None:
    assert theirs.tokens == ours.tokens
    assert theirs.last.finish is ours.last.finish
    if ours.last.result is None:
        assert theirs.last.result is None
        return
    assert (theirs.last.result.position, theirs.last.result.pending) == (
        ours.last.result.position, ours.last.result.pending
    )  # fmt: skip
    same_state(theirs.last.result.state, ours.last.result.state)


def test_ragged_prompts_in_chunks(native: Any, vllm: Any, greedy: Any, same_state: Any) -> None:
    """Ten at a time in eight slots, the longest in three chunks of prefill."""
    luck = random.Random(3)
    prompts = [[luck.randrange(5, 4096) for _ in range(length)] for length in LENGTHS]
    sequences = [Sequence(str(i), prompt, greedy(), keep_state=True) for i, prompt in enumerate(prompts)]
    for ours, theirs in both(native, vllm, sequences):
        equal(ours, theirs, same_state)


def test_six_sessions_of_four_short_turns(native: Any, vllm: Any, loaded: Any, greedy: Any, same_state: Any) -> None:
    """Each engine goes on from its own states. The control, which drops them, must answer questions otherwise."""
    tokenizer, starts = loaded.tokenizer, [(None, None)] * len(TOLD)
    changed = 0
    for number in range(4):
        sequences = {"native": [], "vllm": [], "control": []}
        for i, (fact, question) in enumerate(TOLD.items()):
            content = (fact, question, "Tell me again.", question)[number]
            text = tokenizer.render([{"role": "user", "content": content}])
            for name, start in zip(("native", "vllm"), starts[i], strict=True):
                left = [] if start is None else [start.pending]
                fields = {} if start is None else {"state": start.state, "position": start.position}
                sequences[name].append(Sequence(f"{name}-{i}", left + text, greedy(), keep_state=True, **fields))
            dropped = replace(sequences["vllm"][-1], id=f"control-{i}", state=None, position=0, output=[])
            sequences["control"].append(dropped)
        ours, theirs = native.run(*sequences["native"]), vllm.run(*sequences["vllm"])
        for one, other in zip(ours, theirs, strict=True):
            equal(one, other, same_state)
        if number in (1, 3):
            control = vllm.run(*sequences["control"])
            changed += sum(c.tokens != t.tokens for c, t in zip(control, theirs, strict=True))
        starts = [(one.last.result, other.last.result) for one, other in zip(ours, theirs, strict=True)]
    assert changed >= 9, f"only {changed} of 12 answers depend on the memory"


def test_what_vllm_decides_too_late(native: Any, vllm: Any, loaded: Any, greedy: Any, same_state: Any) -> None:
    """Stop strings, the state at the prompt's end and reading without answering leave exactly the state that is due."""
    prompt = loaded.tokenizer.render([{"role": "user", "content": "My dog is called Rex."}])
    free = native.run(Sequence("free", prompt, greedy(16, ignore_eos=True)))[0].tokens
    seen: dict[str, list[int]] = {}

    def stops_at(name: str) -> Any:
        return lambda token: seen.setdefault(name, []).append(token) or len(seen[name]) == 5  # type: ignore[func-returns-value]

    for name, fields in {
        "stop": {"params": greedy(16, ignore_eos=True), "keep_state": True},
        "prompt": {"params": greedy(16), "keep_state_at_prompt": True},
        "absorb": {"params": greedy(0), "keep_state": True},
        "token": {"params": greedy(16, stop_token_ids=(free[3],)), "keep_state": True},
        "length": {"params": greedy(3), "keep_state": True},
    }.items():
        for placeholder in ([], [0]):  # a prompt that begins with the placeholder's id is read like any other
            sequences = []
            for engine in ("native", "vllm"):
                key = f"{engine}-{name}-{len(placeholder)}"
                check = stops_at(key) if name == "stop" else None
                sequences.append(Sequence(key, placeholder + prompt, stop_check=check, **fields))
            ours, theirs = native.run(sequences[0])[0], vllm.run(sequences[1])[0]
            equal(ours, theirs, same_state)
            assert ours.last.result is not None
            assert len(ours.tokens) == {"stop": 5, "absorb": 0, "length": 3}.get(name, len(ours.tokens))


def test_log_probabilities(native: Any, vllm: Any, loaded: Any, greedy: Any) -> None:
    """Of sampled and of prompt tokens, on a fresh and on a resumed state."""
    prompt = loaded.tokenizer.render([{"role": "user", "content": "I live in Lisbon."}])
    start = native.run(Sequence("start", prompt, greedy(), keep_state=True))[0].last.result
    for fields in ({}, {"state": start.state, "position": start.position}):
        params = greedy(4, logprobs=3, prompt_logprobs=2)
        ((ours, theirs),) = both(native, vllm, [Sequence(f"scored-{len(fields)}", prompt, params, **fields)])
        assert theirs.tokens == ours.tokens
        found = [e.logprobs for e in theirs.events if e.token is not None]
        expected = [e.logprobs for e in ours.events if e.token is not None]
        for other, one in zip(
            [*found, *theirs.events[0].prompt_logprobs], [*expected, *ours.events[0].prompt_logprobs], strict=True
        ):
            if one is None:
                assert other is None
                continue
            assert (other.token, other.rank) == (one.token, one.rank)
            assert other.logprob == pytest.approx(one.logprob, abs=1e-3)
            assert [t for t, _ in other.top] == [t for t, _ in one.top]


def test_aborted_leaves_nothing_and_all_is_well(
    vllm: Any, native: Any, loaded: Any, greedy: Any, same_state: Any
) -> None:
    """A reader that goes away frees its block; companions and whoever gets the block next see nothing of it."""
    prompt = loaded.tokenizer.render([{"role": "user", "content": "Tea, please."}])

    async def leave() -> None:
        for number in range(12):  # more than there are blocks
            stream = vllm.backend.submit(
                Sequence(f"gone-{number}", prompt, greedy(500, ignore_eos=True), keep_state=True)
            )
            await anext(stream)
            await stream.aclose()

    vllm.wait(leave())
    ((ours, theirs),) = both(native, vllm, [Sequence("after", prompt, greedy(), keep_state=True)])
    equal(ours, theirs, same_state)
    assert vllm.wait(vllm.backend.check()) == []
    assert list(vllm.backend._mailbox.folder.iterdir()) == [vllm.backend._mailbox.folder / "socket"]


def test_refused_before_anything_runs(vllm: Any, greedy: Any, native: Any) -> None:
    for sequence, error in (
        (Sequence("empty", [], greedy()), RequestError),
        (Sequence("unknown", [4096], greedy()), RequestError),
        (Sequence("long", [5] * 2000, greedy(100)), ContextOverflow),
        (Sequence("foreign", [5], greedy(), state={"no": None}), StateError),  # type: ignore[dict-item]
    ):
        with pytest.raises(error):
            vllm.run(sequence)
    assert vllm.backend.stats()["running"] == 0
    assert native.run(Sequence("fine", [5], greedy(1)))[0].last.finish in (FinishReason.LENGTH, FinishReason.STOP)
