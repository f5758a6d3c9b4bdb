"""Text to tokens and back, the chat template, and decoding token by token."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_runtime.errors import RequestError
from nested_runtime.tokenizer import ROLES, SPECIAL, IncrementalDecoder, Tokenizer

EXAMPLES = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
UNICODE = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("aé€😀 \n" + "".join(SPECIAL)))
SPELLED = st.lists(UNICODE | st.sampled_from(SPECIAL), max_size=6).map("".join)
IDS = st.lists(st.integers(0, 299), max_size=40)


def stream(tokenizer: Tokenizer, ids: list[int], *, strip: bool) -> str:
    decoder = IncrementalDecoder(tokenizer, strip=strip)
    return "".join([decoder.push(i) for i in ids] + [decoder.flush()])


@EXAMPLES
@given(SPELLED)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@EXAMPLES
@given(SPELLED)
def test_special_tokens_spelled_in_text_are_text(tokenizer: Tokenizer, text: str) -> None:
    assert not tokenizer.special_ids & set(tokenizer.encode(text))


@EXAMPLES
@given(SPELLED)
def test_offsets_end_where_the_text_so_far_ends(tokenizer: Tokenizer, text: str) -> None:
    pairs = tokenizer.encode_offsets(text)
    assert [i for i, _ in pairs] == tokenizer.encode(text)
    for count, (_, end) in enumerate(pairs, 1):
        so_far = tokenizer.decode(i for i, _ in pairs[:count]).rstrip("\ufffd")
        assert text[:end].startswith(so_far)
        assert len(text[:end]) - len(so_far) <= 1, "a token may end inside one character, no more"


@EXAMPLES
@given(IDS, st.booleans())
def test_streaming_gives_the_text_of_the_whole_list(tokenizer: Tokenizer, ids: list[int], strip: bool) -> None:
    """Any ids at all: broken UTF-8 and special tokens among them."""
    whole = tokenizer.decode(ids)
    assert stream(tokenizer, ids, strip=strip) == (whole.removeprefix(" ") if strip else whole)


@EXAMPLES
@given(IDS)
def test_the_text_of_a_list_is_that_of_its_bytes(tokenizer: Tokenizer, ids: list[int]) -> None:
    data = b"".join(tokenizer.token_bytes(i) for i in ids if i not in tokenizer.special_ids)
    assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("char", ["é", "€", "😀", "한"])
def test_a_character_split_over_tokens_is_emitted_once_whole(tokenizer: Tokenizer, char: str) -> None:
    single = [next(i for i in range(5, 300) if tokenizer.token_bytes(i) == bytes([b])) for b in char.encode()]
    decoder = IncrementalDecoder(tokenizer, strip=False)
    assert [decoder.push(i) for i in single] == [""] * (len(single) - 1) + [char]
    assert [decoder.push(i) for i in single[:-1]] == [""] * (len(single) - 1)
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_one_leading_space_is_stripped_and_no_more(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, tokenizer.encode("  Rex "), strip=True) == " Rex "
    assert stream(tokenizer, tokenizer.encode(" Rex "), strip=False) == " Rex "


@EXAMPLES
@given(st.sampled_from(list(ROLES)), SPELLED)
def test_a_message_is_role_space_content_end(tokenizer: Tokenizer, role: str, content: str) -> None:
    first, *middle, last = tokenizer.render_message(role, content)
    assert first == SPECIAL.index(ROLES[role]) == tokenizer.role_id(role)
    assert last == tokenizer.end_id == SPECIAL.index("<|end|>")
    assert tokenizer.decode(middle) == f" {content}"
    assert stream(tokenizer, [first, *middle, last], strip=True) == content


def test_a_conversation_is_its_messages_and_the_prompt_for_the_reply(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "I am Ann<|end|>"}]
    each = [tokenizer.render_message(m["role"], m["content"]) for m in messages]
    assert tokenizer.render(messages, add_generation_prompt=False) == each[0] + each[1]
    assert tokenizer.render(messages) == each[0] + each[1] + [tokenizer.role_id("assistant")]
    assert each[1].count(tokenizer.end_id) == 1, "content cannot end its own message"
    assert tokenizer.render_message("developer", "x") == tokenizer.render_message("system", "x")


def test_an_unknown_role_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="unknown role 'wizard'; use one of system, developer") as caught:
        tokenizer.render_message("wizard", "hi")
    assert caught.value.param == "messages"


def test_text_that_is_not_unicode_is_a_request_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"lone surrogate.*\\ud800"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("token_id", [300, 10**6])
def test_an_unknown_id_is_named(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(RequestError, match=rf"token id {token_id} is not in the vocabulary \(0-299\)"):
        tokenizer.token(token_id)


def test_bytes_of_every_token_are_known(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_bytes(i) for i in range(5)] == [s.encode() for s in SPECIAL]
    singles = {tokenizer.token_bytes(i) for i in range(5, 300)}
    assert {bytes([b]) for b in range(256)} <= singles
