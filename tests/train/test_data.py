"""From files to lanes: what is read, how it is weighted, and how sessions are cut into carried segments."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_runtime.errors import ConfigError
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train import data
from nested_runtime.train.data import FIRST, KINDS, Corpus, Lanes, Mixture, read_rows, render_dialogue, texts
from nested_runtime.train.dialogues import copy_drill, generate, stage
from nested_runtime.train.messages import Dialogue, Message, Span, Weights

EXAMPLES = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def only(kind: str) -> Mixture:
    shares = dict.fromkeys(KINDS, 0.0) | {kind: 1.0}
    return Mixture(shares, shares, shares)


def test_plain_and_packed_files_are_read(data_folder: Path) -> None:
    rows = list(read_rows(data_folder / "pretrain_1_tiny.jsonl.zst"))
    assert len(rows) == 250
    assert rows[7] == {"text": "The cat number 7 sat on the mat and slept."}
    assert len(list(read_rows(data_folder / "chat_1_tiny.jsonl"))) == 250


def test_share_alike_files_are_left_out(data_folder: Path) -> None:
    assert not any("Forbidden" in text for text in texts(data_folder))


@pytest.mark.parametrize(
    ("asked", "stays"),
    [("Who directed it?", False), ("I like it. So, which one is that?", False), ("When is the game", True),
     ("Do you remember the scene with the yacht?", False), ("how old is she?", False), ("I know who did it.", True),
     ("What do you think of it?", True), ("Where are you from?", True), ("Did you like it?", True),
     ("Who is it? I can tell.", True)],
)  # fmt: skip
def test_chats_answer_nothing_that_memory_is_asked(asked: str, stays: bool) -> None:
    """Questions for facts go with their answers; opinions, questions about the assistant and statements stay."""
    before, after = (("user", "Hi!"), ("assistant", "Hello.")), (("user", "Bye."), ("assistant", "See you!"))
    turn = (("user", asked), ("assistant", "Orson Welles."))
    assert data._without_asks((*before, *turn, *after)) == (*before, *(turn if stays else ()), *after)


def test_held_out_documents_are_the_rest(data_folder: Path, corpus: Corpus, small_tokenizer: Tokenizer) -> None:
    held = Corpus(data_folder, small_tokenizer, held_out=True)
    assert len(corpus.prose) + len(held.prose) == 250
    assert len(corpus.chats) + len(held.chats) == 250
    assert 0 < len(held.prose) < 25
    assert not {bytes(p) for p in corpus.prose} & {bytes(p) for p in held.prose}


@pytest.mark.parametrize("line", ["{", "[1]", "\udcff"])
def test_a_damaged_row_names_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "chat_1.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n", errors="surrogateescape")
    with pytest.raises(ConfigError, match=r"chat_1\.jsonl.*line [012]"):
        list(read_rows(path))


def test_a_truncated_archive_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pretrain_1.jsonl.zst"
    path.write_bytes(b"not zstandard at all")
    with pytest.raises(ConfigError, match=r"pretrain_1\.jsonl\.zst"):
        list(read_rows(path))


def test_a_folder_without_data_is_named(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="holds no prose"):
        Corpus(tmp_path, small_tokenizer)
    with pytest.raises(ConfigError, match="is not a folder"):
        Corpus(tmp_path / "none", small_tokenizer)


@EXAMPLES
@given(st.integers(0, 2**31), st.booleans())
def test_a_rendered_dialogue_is_its_messages(small_tokenizer: Tokenizer, seed: int, drill: bool) -> None:
    rng = random.Random(seed)
    dialogue = copy_drill(rng, "train") if drill else generate(rng, "train", stage(rng.random()))
    session = render_dialogue(dialogue, small_tokenizer)
    messages = [{"role": m.role, "content": m.content} for m in dialogue.messages]
    assert session.tokens.tolist() == small_tokenizer.render(messages, add_generation_prompt=False)
    assert session.weights.shape == session.tokens.shape


@EXAMPLES
@given(st.integers(0, 2**31))
def test_the_heaviest_tokens_spell_the_values(small_tokenizer: Tokenizer, seed: int) -> None:
    """In order: nothing of a value, or of the dots in its place, weighs less, nothing else as much."""
    dialogue = generate(random.Random(seed), "train", stage(1.0))
    session = render_dialogue(dialogue, small_tokenizer)
    spelled = small_tokenizer.decode(session.tokens[session.weights >= Weights.value].tolist())
    values = [span.text for m in dialogue.messages for span in m.spans if span.weight >= Weights.value]
    assert spelled.replace(" ", "") == "".join(values).replace(" ", "")


def test_weights_of_a_message_by_hand(small_tokenizer: Tokenizer) -> None:
    """A value at the very start keeps its leading space, one in the middle ends before the full stop; its first token
    weighs double, that of an answer what an opening does."""
    for spans in (
        (Span("7 Éclair", 3.0), Span(" is right.", 1.0)),
        (Span("It is", 1.0), Span(" 😀 Zephlo", 3.0), Span(".", 0.5)),
    ):
        session = render_dialogue(Dialogue((Message("assistant", spans),), ()), small_tokenizer)
        ids = session.tokens.tolist()[1:-1]
        weights = session.weights.tolist()
        assert (weights[0], weights[-1]) == (np.float32(0.3), 1.0), "role and end tokens"
        at = 0
        for number, span in enumerate(spans):
            text = (" " if number == 0 else "") + span.text
            mine = []
            while small_tokenizer.decode(mine) != text:
                mine.append(ids[at])
                expected = span.weight * (FIRST if span.weight == Weights.value and not mine[1:] else 1.0)
                if at == 0 and span.weight == Weights.answer:
                    expected = Weights.opening
                assert weights[at + 1] == expected, text
                at += 1
        assert at == len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_segments_carry_on_where_the_last_ended(corpus: Corpus, small_tokenizer: Tokenizer, kind: str) -> None:
    length = 32
    lanes = Lanes(corpus, small_tokenizer, 3, length, 5, only(kind))
    tokens, weights, fresh, idle = lanes.next()
    assert fresh.all(), "the first segment of every lane starts a session"
    for _ in range(30):
        before = tokens
        tokens, weights, fresh, idle = lanes.next()
        assert tokens.shape == (3, length + 1)
        assert tokens.dtype == np.int64
        assert weights.shape == (3, length)
        assert fresh.shape == (3,)
        assert idle.shape == (3, length)
        for lane in range(3):
            if not fresh[lane]:
                assert tokens[lane, 0] == before[lane, -1]
    assert tokens.max() < small_tokenizer.vocab_size


def test_a_lane_is_its_sessions_cut_up(corpus: Corpus, small_tokenizer: Tokenizer) -> None:
    """Joined segments give each session exactly, tokens and weights aligned, fresh where it begins."""
    lanes = Lanes(corpus, small_tokenizer, 1, 32, 9, only("dialogue"))
    session, at = lanes._lanes[0], 0
    for _ in range(40):
        tokens, weights, fresh, idle = lanes.next()
        if lanes._lanes[0] is not session:
            assert at == len(session.tokens) - 1, "a session is read to its end"
            session, at = lanes._lanes[0], 0
        assert fresh[0] == (at == 0)
        assert tokens[0].tolist() == session.tokens[at : at + 33].tolist()
        assert weights[0].tolist() == session.weights[at + 1 : at + 33].tolist()
        assert idle[0].tolist() == session.idle[at : at + 32].tolist()
        at += 32
    whole = {
        1.0,
        Weights.opening,
        Weights.ack,
        Weights.ack_value,
        Weights.unknown,
        Weights.untold,
        Weights.value,
        Weights.value * FIRST,
    }
    drawn = {round(float(w), 4) for w in np.unique(session.weights)}
    assert drawn <= {0.0} | whole, "small weights become rare whole ones"
    assert (session.weights == Weights.value).any()


def test_all_but_tellings_and_answers_is_idle(corpus: Corpus, small_tokenizer: Tokenizer) -> None:
    """Chats, questions and denials are marked; nothing that anybody told, said back or answered."""
    mixture = replace(only("dialogue"), far=1.0, farthest=200)
    lanes = Lanes(corpus, small_tokenizer, 1, 32, 4, mixture, progress=1.0)
    drawn = (lanes._dialogue() for _ in range(100))
    wanted = (Weights.unknown, Weights.value * FIRST)
    session = next(session for session in drawn if all((session.weights == weight).any() for weight in wanted))
    texts = [small_tokenizer.decode(list(map(int, session.tokens[part]))) for part in (session.idle, ~session.idle)]
    assert session.idle.sum() > 20
    assert "How was day" in texts[0]
    idle, kept = (
        {round(float(w), 3) for w in np.unique(session.weights[part])} for part in (session.idle, ~session.idle)
    )
    assert {Weights.question, Weights.unknown} <= idle - kept
    assert Weights.value * FIRST in kept
    assert not idle & {Weights.value, Weights.value * FIRST, Weights.ack_value}
    assert not lanes._draw().idle.all()


def test_many_turns_behind_a_stretch_of_chat_follow_chat(
    corpus: Corpus, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat of the corpus comes back again and again between the later turns; without a stretch there is none."""
    dense = replace(stage(1.0), small_talk=(0, 0), p_embedded=0.0, p_correction=0.0, questions=(8, 8))
    monkeypatch.setattr(Lanes, "_spec", lambda self: dense)
    for far in (0.0, 1.0):
        lanes = Lanes(corpus, small_tokenizer, 1, 32, 4, replace(only("dialogue"), far=far, farthest=64), progress=1.0)
        returns = []
        for _ in range(20):
            tokens = lanes._dialogue().tokens
            turns = np.split(tokens, np.flatnonzero(tokens == small_tokenizer.role_id("user")))[1:]
            texts_of = [small_tokenizer.decode(turn.tolist()) for turn in turns]
            chats = ["How was day" in text or "And the weather?" in text for text in texts_of]
            returns.append(sum(now and not before for before, now in pairwise(chats)))
        assert max(returns) == 0 if far == 0 else sum(returns) > 1.5 * len(returns), returns


def test_lanes_are_a_function_of_the_seed(corpus: Corpus, small_tokenizer: Tokenizer) -> None:
    def draw(seed: int) -> list[int]:
        lanes = Lanes(corpus, small_tokenizer, 2, 32, seed, Mixture())
        return [int(t) for _ in range(5) for t in lanes.next()[0].flatten()]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@given(st.floats(0, 1))
def test_a_mixture_moves_from_first_to_last(progress: float) -> None:
    mixture = Mixture()
    now = mixture.at(progress)
    assert len(now) == len(KINDS)
    assert sum(now) == pytest.approx(1.0)
    assert mixture.at(0.0) == pytest.approx([mixture.first[k] for k in KINDS])
    assert mixture.at(1.0) == pytest.approx([mixture.last[k] for k in KINDS])


@pytest.mark.parametrize(
    "fields", [{"first": {"chat": 1.0}}, {"last": dict.fromkeys(KINDS, -1.0)}, {"dense": 0}, {"dense": 1}]
)
def test_an_impossible_mixture_is_named(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"mixture\.{next(iter(fields))}"):
        Mixture(**fields)  # type: ignore[arg-type]


def test_a_trained_tokenizer_keeps_digits_apart(small_tokenizer: Tokenizer) -> None:
    assert small_tokenizer.decode(small_tokenizer.encode("a 1234 b")) == "a 1234 b"
    assert not any(sum(c in b"0123456789" for c in small_tokenizer.token_bytes(i)) > 1 for i in range(5, 512))
    assert json.loads(small_tokenizer._backend.to_str())["model"]["type"] == "BPE"
