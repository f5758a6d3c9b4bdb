"""Resent conversations: only what the memory has not read is read; edits go back to the fork."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

Chat = Callable[..., httpx.Response]


def said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answered(reply: httpx.Response) -> dict[str, str]:
    assert reply.status_code == 200, reply.text
    return {"role": "assistant", "content": reply.json()["choices"][0]["message"]["content"]}


def session(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    return reply.json()["session"]


def test_a_resent_conversation_reads_only_the_new_message(client: httpx.Client, chat: Chat) -> None:
    one = chat(client, said("one"), session="resent")
    two = chat(client, said("one"), answered(one), said("two"), session="resent")
    only = chat(client, said("one"), session="only")
    only_two = chat(client, said("two"), session="only")
    assert session(two)["history"] == "extended"
    assert session(two)["digest"] == session(only_two)["digest"]
    assert answered(two) == answered(only_two)
    assert two.json()["usage"] == only_two.json()["usage"]
    assert session(only)["digest"] == session(one)["digest"]


def test_white_space_around_a_resent_reply_does_not_matter(client: httpx.Client, chat: Chat) -> None:
    one = chat(client, said("one"), session="strip")
    padded = {"role": "assistant", "content": [{"type": "text", "text": f" {answered(one)['content']}\n"}]}
    assert session(chat(client, said("one"), padded, said("two"), session="strip"))["history"] == "extended"


def test_regenerate_and_edit_branch_at_the_fork(client: httpx.Client, chat: Chat) -> None:
    one = chat(client, said("one"), session="fork")
    two = chat(client, said("one"), answered(one), said("two"), session="fork")
    again = chat(client, said("one"), answered(one), said("two"), session="fork")
    assert session(again)["history"] == "branched"
    assert session(again)["version"] == 3
    assert session(again)["digest"] == session(two)["digest"]
    edited = chat(client, said("one"), answered(one), said("2"), session="fork")
    assert session(edited)["history"] == "branched"
    assert session(edited)["digest"] != session(two)["digest"]
    history = client.get("/v1/sessions/fork/history").json()["data"]
    assert [(v["version"], v["parent"], v["source"]) for v in history] == [
        (4, 3, 1),
        (3, 2, 1),
        (2, 1, None),
        (1, None, None),
    ]
    alone = chat(client, said("one"), session="fork-alone")
    alone = chat(client, said("one"), answered(alone), said("2"), session="fork-alone")
    assert session(alone)["digest"] == session(edited)["digest"]


def test_the_first_answer_is_regenerated_on_request(client: httpx.Client, chat: Chat) -> None:
    one = chat(client, said("one"), session="first")
    again = chat(client, said("one"), session="first", memory={"history": "resent"})
    assert session(again)["history"] == "branched"
    assert session(again)["digest"] == session(one)["digest"]
    more = chat(client, said("one"), session="first")
    assert session(more)["history"] == "new"
    assert session(more)["learned_tokens"] > session(again)["learned_tokens"]


def test_a_new_conversation_continues_the_memory(client: httpx.Client, chat: Chat) -> None:
    system = {"role": "system", "content": "be kind"}
    one = chat(client, system, said("one"), session="new")
    two = chat(client, system, said("two"), session="new")
    assert session(two)["history"] == "new"
    assert session(two)["learned_tokens"] > session(one)["learned_tokens"] + 8


def test_two_conversations_on_one_memory(client: httpx.Client, chat: Chat) -> None:
    a = chat(client, said("a"), session="tabs")
    b = chat(client, said("b"), session="tabs")
    more_a = chat(client, said("a"), answered(a), said("a2"), session="tabs")
    assert session(more_a)["history"] == "extended"
    assert session(more_a)["learned_tokens"] > session(b)["learned_tokens"]
    lost = chat(client, said("b"), {"role": "assistant", "content": "edited"}, said("b2"), session="tabs")
    assert lost.status_code == 409
    assert lost.json()["error"]["code"] == "history_conflict"
    assert "another conversation" in lost.json()["error"]["message"]
    assert lost.headers["x-should-retry"] == "false"


def test_a_fork_that_is_no_longer_kept(client: httpx.Client, chat: Chat) -> None:
    chat(client, "another conversation", session="gone")
    messages = [said("m0")]
    for turn in range(1, 11):
        reply = chat(client, *messages, session="gone")
        messages += [answered(reply), said(f"m{turn}")]
    gone = chat(client, said("m0"), messages[1], said("edited"), session="gone")
    assert gone.status_code == 409
    assert gone.json()["error"]["code"] == "history_conflict"
    assert "no longer kept" in gone.json()["error"]["message"]
    assert session(chat(client, said("edited"), session="gone"))["version"] == 12


def test_a_fork_at_the_beginning_of_everything_is_always_kept(client: httpx.Client, chat: Chat) -> None:
    messages = [said("m0")]
    for turn in range(1, 11):
        reply = chat(client, *messages, session="begin")
        messages += [answered(reply), said(f"m{turn}")]
    edited = chat(client, said("m0"), messages[1], said("edited"), session="begin")
    alone = chat(client, said("m0"), messages[1], said("edited"), session="begin-alone")
    assert session(edited)["history"] == "branched"
    assert session(edited)["digest"] == session(alone)["digest"]


def test_a_conversation_that_was_answered_already(client: httpx.Client, chat: Chat) -> None:
    one = chat(client, said("one"), session="answered")
    assert chat(client, said("one"), answered(one), session="answered").status_code == 400


def test_a_reply_cut_short_is_closed_before_the_next_message(client: httpx.Client, chat: Chat) -> None:
    one = chat(client, said("one"), session="cut", max_tokens=3)
    two = chat(client, said("two"), session="cut", max_tokens=3)
    # the reply's last token and its end, then <|user|> " two" <|end|> <|assistant|>
    assert two.json()["usage"]["prompt_tokens"] == 2 + 4 + 3
    assert session(two)["learned_tokens"] == session(one)["learned_tokens"] + 9 + 2
