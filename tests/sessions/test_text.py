"""Stop strings and held-back text: a stream says the same as the whole, however the tokens cut the text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from nested_runtime.sessions.text import ReplyText, stop_check
from nested_runtime.tokenizer import SPECIAL, Tokenizer

VOCAB = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}


def tokenizer() -> Tokenizer:
    backend = Backend(models.BPE(VOCAB, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


TOKENIZER = tokenizer()
words = st.text(alphabet="ab\u00e9\u2603 ", max_size=12)


def streamed(text: str, stop: tuple[str, ...], **options: int) -> tuple[list[str], ReplyText, int]:
    """What was sent piece by piece, and how many tokens were read before the stop."""
    reply = ReplyText(TOKENIZER, stop, **options)
    pieces, tokens = [], TOKENIZER.encode(f" {text}")
    for count, token in enumerate(tokens, 1):
        pieces.append(reply.push(token))
        if reply.stopped:
            return pieces, reply, count
    pieces.append(reply.flush())
    return pieces, reply, len(tokens)


@settings(deadline=None)  # the machine may be busy
@given(words, st.lists(st.text(alphabet="ab\u00e9\u2603 ", min_size=1, max_size=4), max_size=3))
def test_a_stream_ends_where_the_first_stop_string_begins(text: str, stops: list[str]) -> None:
    pieces, reply, _ = streamed(text, tuple(stops))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    whole = text
    if ends:
        first = min(ends)  # the stop string that is complete first decides
        whole = min((text[: text.find(s)] for s in stops if s in text[:first]), key=len)
    assert "".join(pieces) == reply.text == whole


@settings(deadline=None)  # the machine may be busy
@given(words, st.text(alphabet="ab\u00e9\u2603 ", min_size=1, max_size=4))
def test_the_engine_stops_at_the_same_token(text: str, stop: str) -> None:
    _, reply, count = streamed(text, (stop,))
    check = stop_check(TOKENIZER, (stop,))
    assert check is not None
    tokens = TOKENIZER.encode(f" {text}")
    stops = next((i for i, token in enumerate(tokens, 1) if check(token)), None)
    assert stops == (count if reply.stopped else None)


def test_without_stop_strings_nothing_is_held_back() -> None:
    pieces, _, _ = streamed("abc", ())
    assert pieces == ["", "a", "b", "c", ""]
    assert stop_check(TOKENIZER, ()) is None


def test_what_may_begin_a_stop_string_waits() -> None:
    pieces, _, _ = streamed("xaab", ("aac",))
    assert pieces == ["", "x", "", "", "aab", ""]


@pytest.mark.parametrize(("minimum", "expected"), [(0, ""), (2, ""), (3, "ab"), (9, "abab")])
def test_stops_count_from_min_tokens_on(minimum: int, expected: str) -> None:
    _, reply, _ = streamed("abab", ("ab",), min_tokens=minimum)
    assert reply.text.startswith(expected)
