"""A turn again from the same version finds the state after its question: same bits, nobody else's, gone with it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from nested_runtime.kernels.dispatch import packed_kernels
from nested_runtime.store.base import SessionKey

Chat = Callable[..., httpx.Response]
SYSTEM = {"role": "system", "content": "Answer in one short sentence, and say when you do not know something."}
QUESTION = "what was the name of the village where the river bends twice before the mill?"
ADMIN = {"Authorization": "Bearer key-of-admin"}


def cached(reply: httpx.Response) -> int:
    assert reply.status_code == 200, reply.text
    return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def prompt_tokens(reply: httpx.Response) -> int:
    return int(reply.json()["usage"]["prompt_tokens"])


def digest(reply: httpx.Response) -> str:
    return str(reply.json()["session"]["digest"])


def said(reply: httpx.Response) -> tuple[str, str]:
    """The reply's text and, where no schedule changes a bit, the digest of the state."""
    kernels = packed_kernels("cpu", torch.float32)
    return text(reply), digest(reply) if kernels is not None and kernels.name == "native" else ""


def text(reply: httpx.Response) -> str:
    return str(reply.json()["choices"][0]["message"]["content"])


def conversation(client: httpx.Client, chat: Chat, session: str) -> list[dict[str, str]]:
    """After its first turn, with the next question."""
    first = {"role": "user", "content": "one"}
    reply = {"role": "assistant", "content": text(chat(client, first, session=session))}
    return [first, reply, {"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def busy(settings: Any, serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of this file alone, with keys for two tenants and an admin."""
    keys, admin = (tmp_path_factory.mktemp("keys") / name for name in ("keys", "admin"))
    keys.write_text("alice key-of-a\nbob key-of-b\n")
    admin.write_text("key-of-admin")
    with serve(settings(api_key_file=keys, admin_key_file=admin)) as server:
        yield server


@pytest.fixture
def alice(busy: Any) -> Iterator[httpx.Client]:
    with busy.client(headers={"Authorization": "Bearer key-of-a"}) as client:
        yield client


@pytest.fixture
def bob(busy: Any) -> Iterator[httpx.Client]:
    with busy.client(headers={"Authorization": "Bearer key-of-b"}) as client:
        yield client


def test_a_regenerated_turn_costs_no_prefill_and_changes_no_bit(alice: httpx.Client, chat: Chat) -> None:
    messages = conversation(alice, chat, "s")
    two = chat(alice, *messages, session="s")
    again = chat(alice, *messages, session="s")
    assert again.json()["session"]["history"] == "branched"
    assert (cached(two), cached(again)) == (0, prompt_tokens(two) - 1)
    assert (text(again), digest(again)) == (text(two), digest(two))
    other = chat(alice, *messages, session="s", temperature=1.5, seed=3)
    assert cached(other) == prompt_tokens(two) - 1
    assert text(other) != text(two)


def test_the_engine_reads_one_token_of_a_regenerated_turn(busy: Any, alice: httpx.Client, chat: Chat) -> None:
    """What usage says is what the engine did."""
    messages = conversation(alice, chat, "read")
    chat(alice, *messages, session="read")
    stats = busy.service.runtime.models["tiny"].backend.stats
    before = stats()["prompt_tokens"]
    with alice.stream(
        "POST",
        "/v1/chat/completions",
        headers={"X-Session-ID": "read"},
        json={
            "model": "tiny",
            "messages": messages,
            "max_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ) as reply:
        chunks = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    assert stats()["prompt_tokens"] == before + 1
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_with_and_without_the_cache(alice: httpx.Client, settings: Any, serve: Any, chat: Chat) -> None:
    with serve(settings(engine={"prefix_cache_bytes": 0})) as plain, plain.client() as client:
        found = []
        for http in (alice, client):
            messages = [SYSTEM, *conversation(http, chat, "both")]
            turns = [chat(http, *messages, session="both") for _ in range(2)]
            found.append([said(one) for one in turns])
            assert bool(cached(turns[1])) == (http is alice)
    assert found[0] == found[1]


def test_many_at_once_are_each_alone(alice: httpx.Client, chat: Chat) -> None:
    """Regenerated turns of several sessions in one batch, some from the cache and some not."""
    names = [f"crowd-{number}" for number in range(6)]
    talks = {name: conversation(alice, chat, name) for name in names}
    alone = {name: chat(alice, *talks[name], session=name) for name in names[::2]}
    with ThreadPoolExecutor(6) as pool:
        crowd = dict(zip(names, pool.map(lambda name: chat(alice, *talks[name], session=name), names), strict=True))
    for number, name in enumerate(names):
        assert bool(cached(crowd[name])) == (number % 2 == 0)
        assert said(crowd[name]) == said(alone[names[0]])  # all were told the same
    assert cached(crowd[names[0]]) == prompt_tokens(alone[names[0]]) - 1


def test_another_session_and_tenant_and_version_find_nothing(
    alice: httpx.Client, bob: httpx.Client, chat: Chat
) -> None:
    messages = conversation(alice, chat, "mine")
    chat(alice, *messages, session="mine")
    for client, name in ((alice, "yours"), (bob, "mine")):
        same = conversation(client, chat, name)
        assert same == messages
        assert cached(chat(client, *same, session=name)) == 0
    assert cached(chat(alice, QUESTION, session="mine")) == 0  # from a later version
    assert cached(chat(alice, QUESTION)) == cached(chat(bob, QUESTION)) == 0


def test_a_new_session_shares_the_system_prompt_and_keeps_its_question_to_itself(
    alice: httpx.Client, bob: httpx.Client, chat: Chat
) -> None:
    resent = {"memory": {"history": "resent"}}
    one = chat(alice, SYSTEM, QUESTION, session="new")
    again = chat(alice, SYSTEM, QUESTION, session="new", **resent)
    shared = chat(alice, SYSTEM, QUESTION, session="newer")
    assert cached(again) == prompt_tokens(one) - 1
    assert 0 < cached(shared) <= len(SYSTEM["content"]) + 2
    assert said(one) == said(again) == said(shared)
    assert cached(chat(bob, SYSTEM, QUESTION, session="new")) == 0


def keys_of(busy: Any, session: str) -> list[tuple[str, ...]]:
    backend = busy.service.runtime.models["tiny"].backend
    return [key for key in busy.run(backend.cached()) if key[:2] == ("alice", session)]


@pytest.mark.parametrize("how", ["user", "admin", "tenant"])
def test_deleting_evicts(busy: Any, alice: httpx.Client, chat: Chat, how: str) -> None:
    name = f"deleted-{how}"
    chat(alice, QUESTION, session=name)
    assert keys_of(busy, name)
    if how == "user":
        assert alice.delete(f"/v1/sessions/{name}").status_code == 200
    else:
        where = f"/sessions/{name}" if how == "admin" else ""
        assert alice.delete(f"/admin/tenants/alice{where}", headers=ADMIN).status_code == 200
    assert not keys_of(busy, name)
    assert cached(chat(alice, QUESTION, session=name)) == 0


def test_a_session_deleted_before_its_turn_is_read_leaves_nothing(busy: Any, alice: httpx.Client, chat: Chat) -> None:
    """The engine reads the question after the deletion: what it caches then goes when the commit is refused."""
    chat(alice, "one", session="lost")
    backend, gate = busy.service.runtime.models["tiny"].backend, threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            backend._post(lambda: gate.wait(60))
            slow = pool.submit(chat, alice, QUESTION, session="lost")
            while not backend.stats()["streams"]:
                time.sleep(0.005)
            assert alice.delete("/v1/sessions/lost").status_code == 200
        finally:
            gate.set()
        assert slow.result().status_code == 409
    assert not keys_of(busy, "lost")


def test_what_another_server_deleted_goes_at_the_next_sweep(busy: Any, alice: httpx.Client, chat: Chat) -> None:
    for name in ("swept", "kept"):
        chat(alice, QUESTION, session=name)
    busy.run(busy.service.store.delete(SessionKey("alice", "swept")))
    assert keys_of(busy, "swept")
    busy.run(busy.service.vault.forget_deleted())
    assert not keys_of(busy, "swept")
    assert keys_of(busy, "kept")
