"""The sessions API: reset, snapshots, restore, fork, export and import, learn, levels, history."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
import pytest

Chat = Callable[..., httpx.Response]


def info(client: httpx.Client, name: str) -> dict[str, Any]:
    reply = client.get(f"/v1/sessions/{quote(name, safe='')}")
    assert reply.status_code == 200, reply.text
    return reply.json()


def content(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_after_reset_it_is_a_fresh_session(client: httpx.Client, chat: Chat) -> None:
    fresh = chat(client, "who am I?", session="fresh", max_tokens=24)
    for text in ("my name is Ada", "I live in Rome"):
        chat(client, text, session="reset")
    reset = client.post("/v1/sessions/reset/reset").json()
    assert (reset["version"], reset["tokens"], reset["kind"]) == (3, 0, "reset")
    chat(client, "x", session="empty")
    assert client.post("/v1/sessions/empty/reset", json={"levels": "all"}).json()["digest"] == reset["digest"]
    again = chat(client, "who am I?", session="reset", max_tokens=24)
    assert content(again) == content(fresh)
    assert again.json()["session"]["digest"] == fresh.json()["session"]["digest"]


def test_reset_of_one_level(client: httpx.Client, chat: Chat) -> None:
    chat(client, "my name is Ada", session="level")
    levels = client.get("/v1/sessions/level/levels").json()
    names = [one["level"] for one in levels["data"]]
    assert "fast" in names
    assert next(one["norm"] for one in levels["data"] if one["level"] == "fast") > 0
    reset = client.post("/v1/sessions/level/reset", json={"levels": ["fast"]})
    assert reset.json()["tokens"] == levels["tokens"]
    after = client.get("/v1/sessions/level/levels").json()["data"]
    assert next(one["norm"] for one in after if one["level"] == "fast") == 0
    unknown = client.post("/v1/sessions/level/reset", json={"levels": ["slow"]})
    assert unknown.status_code == 400
    assert "fast" in unknown.json()["error"]["message"]


def test_snapshot_more_turns_restore(client: httpx.Client, chat: Chat) -> None:
    chat(client, "my name is Ada", session="snap")
    kept = client.post("/v1/sessions/snap/snapshot", json={"label": "before"}).json()
    assert kept["version"] == 1
    digest = info(client, "snap")["digest"]
    once = chat(client, "who am I?", session="snap", max_tokens=24)
    for turn in range(9):
        chat(client, f"more {turn}", session="snap")
    assert [one["snapshot"] for one in client.get("/v1/sessions/snap/snapshots").json()["data"]] == [kept["snapshot"]]
    restored = client.post("/v1/sessions/snap/restore", json={"snapshot": kept["snapshot"]}).json()
    assert (restored["version"], restored["digest"], restored["source"]) == (12, digest, 1)
    assert content(chat(client, "who am I?", session="snap", max_tokens=24)) == content(once)
    assert client.post("/v1/sessions/snap/restore", json={"version": 2}).status_code == 404
    assert client.post("/v1/sessions/snap/restore", json={}).status_code == 400
    assert client.delete(f"/v1/sessions/snap/snapshots/{kept['snapshot']}").json()["deleted"]
    assert client.post("/v1/sessions/snap/restore", json={"snapshot": kept["snapshot"]}).status_code == 404


def test_a_conversation_goes_on_after_restore(client: httpx.Client, chat: Chat) -> None:
    user = {"role": "user", "content": "one"}
    one = chat(client, user, session="back")
    conversation = [user, {"role": "assistant", "content": content(one)}]
    chat(client, "something else", session="back")
    client.post("/v1/sessions/back/restore", json={"version": 1})
    two = chat(client, *conversation, "two", session="back").json()["session"]
    assert two["history"] == "extended"


def test_fork(client: httpx.Client, chat: Chat) -> None:
    chat(client, "my name is Ada", session="trunk")
    chat(client, "I live in Rome", session="trunk")
    first = client.post("/v1/sessions/trunk/fork", json={"id": "twig", "version": 1}).json()
    assert first["digest"] == client.get("/v1/sessions/trunk/history").json()["data"][1]["digest"]
    client.post("/v1/sessions/trunk/fork", json={"id": "leaf"})
    assert content(chat(client, "who?", session="leaf")) == content(chat(client, "who?", session="trunk"))
    again = client.post("/v1/sessions/trunk/fork", json={"id": "leaf"})
    assert again.status_code == 409
    assert info(client, "trunk")["version"] == 3


def test_if_match_guards_every_change(client: httpx.Client, chat: Chat) -> None:
    for text in ("one", "two"):
        chat(client, text, session="guarded")
    stale, current = {"If-Match": "1"}, {"If-Match": '"2"'}
    changes: list[tuple[str, str, Any]] = [
        ("POST", "/reset", None),
        ("POST", "/restore", {"version": 1}),
        ("POST", "/learn", {"text": "three"}),
        ("POST", "/snapshot", None),
        ("POST", "/fork", {"id": "guarded-fork"}),
        ("DELETE", "", None),
    ]
    for method, path, body in changes:
        refused = client.request(method, f"/v1/sessions/guarded{path}", json=body, headers=stale)
        assert refused.status_code == 409, (path, refused.text)
        assert refused.json()["error"]["code"] == "version_conflict"
    assert client.get("/v1/sessions/guarded-fork").status_code == 404
    assert client.get("/v1/sessions/guarded/snapshots").json()["data"] == []
    made = client.post("/v1/sessions/guarded/snapshot", headers=current).json()
    assert made["version"] == 2
    snapshot = f"/v1/sessions/guarded/snapshots/{made['snapshot']}"
    assert client.delete(snapshot, headers=stale).status_code == 409
    assert client.delete(snapshot, headers=current).json() == {"snapshot": made["snapshot"], "deleted": True}
    assert client.delete(snapshot, headers=current).status_code == 404
    assert client.post("/v1/sessions/guarded/fork", json={"id": "guarded-fork"}, headers=current).status_code == 200
    assert client.delete("/v1/sessions/guarded", headers=current).json()["deleted"]
    assert client.delete("/v1/sessions/guarded", headers=current).status_code == 409  # it is at version 0 now
    assert client.get("/v1/sessions/guarded").status_code == 404


def test_states_rounded_at_rest(settings: Callable[..., Any], serve: Any, chat: Chat) -> None:
    """--at-rest bf16: half the bytes, and it makes no difference whether the state is read again from the store."""
    texts = ["my name is Ada", "I live in Rome", "who am I?"]
    found: dict[str, list[tuple[str, str]]] = {}
    sizes = {}
    for at_rest, resident in (("bf16", 1 << 20), ("bf16", 0), ("exact", 0)):
        stored = settings(sessions={"at_rest": at_rest, "resident_bytes": resident})
        with serve(stored) as server, server.client() as client:
            replies = [chat(client, text, session="s", max_tokens=24) for text in texts]
            sizes[at_rest] = len(client.get("/v1/sessions/s/export").content)
        found[f"{at_rest} {resident}"] = [(content(one), one.json()["session"]["digest"]) for one in replies]
    assert found["bf16 0"] == found[f"bf16 {1 << 20}"]
    assert found["bf16 0"] != found["exact 0"]
    assert sizes["bf16"] < 0.75 * sizes["exact"]


def test_export_and_import(client: httpx.Client, chat: Chat) -> None:
    chat(client, "my name is Ada", session="out")
    blob = client.get("/v1/sessions/out/export")
    assert blob.headers["x-session-version"] == "1"
    back = client.put("/v1/sessions/in/import", content=blob.content)
    assert back.json()["digest"] == info(client, "out")["digest"]
    assert content(chat(client, "who?", session="in")) == content(chat(client, "who?", session="out"))
    over = client.put("/v1/sessions/in/import", content=blob.content, headers={"If-Match": "2"})
    assert over.json()["version"] == 3
    assert client.put("/v1/sessions/in/import", content=blob.content, headers={"If-Match": "2"}).status_code == 409


def test_hostile_imports_change_nothing(client: httpx.Client, chat: Chat) -> None:
    chat(client, "my name is Ada", session="victim")
    before = info(client, "victim")
    good = client.get("/v1/sessions/victim/export").content
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    other_model = good[8 : 8 + size].replace(header["__metadata__"]["fingerprint"].encode(), b"0" * 32)
    bad = [
        b"",
        b"\x80\x04}.",
        good[:-1],
        good[: len(good) // 2],
        good + b"x",
        (100 << 20).to_bytes(8, "little") + good[8:],
        good[:200] + bytes([good[200] ^ 1]) + good[201:],
        good[:-4] + b"\xff\xff\xff\x7f",
        good[:8] + other_model + good[8 + size :],
    ]
    for blob in bad:
        reply = client.put("/v1/sessions/victim/import", content=blob)
        assert reply.status_code in (409, 422), (blob[:20], reply.text)
    assert info(client, "victim")["digest"] == before["digest"]
    assert client.put("/v1/sessions/nobody/import", content=b"x").status_code == 422
    assert client.get("/v1/sessions/nobody").status_code == 404


def test_learn_absorbs_without_answering(client: httpx.Client, chat: Chat) -> None:
    learned = client.post("/v1/sessions/pupil/learn", json={"text": "my name is Ada"}).json()
    assert learned["session"]["version"] == 1
    assert learned["session"]["learned_tokens"] == learned["tokens_read"] == 1 + 15 + 1
    more = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    assert client.post("/v1/sessions/pupil/learn", json=more).json()["session"]["version"] == 2
    assert client.post("/v1/sessions/pupil/learn", json={}).status_code == 400
    taught = chat(client, "who?", session="pupil", max_tokens=40)
    assert content(taught) != content(chat(client, "who?", max_tokens=40))
    kinds = [one["kind"] for one in client.get("/v1/sessions/pupil/history").json()["data"]]
    assert kinds == ["turn", "learn", "learn"]


def test_list_pages(client: httpx.Client, chat: Chat) -> None:
    for number in range(5):
        client.post(f"/v1/sessions/page-{number}/learn", json={"text": "x"})
    found, cursor = [], ""
    while cursor is not None:
        page = client.get("/v1/sessions", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        assert len(page["data"]) <= 2
        found += [one["id"] for one in page["data"]]
        cursor = page["next"]
    assert [name for name in found if name.startswith("page-")] == [f"page-{n}" for n in range(5)]
    assert found == sorted(found)


def test_delete_and_the_id_starts_afresh(server: Any, client: httpx.Client, chat: Chat) -> None:
    key = {"Idempotency-Key": "delete-1"}
    first = chat(client, "my name is Ada", session="gone", headers=key)
    client.post("/v1/sessions/gone/snapshot")
    assert client.delete("/v1/sessions/gone").json() == {"id": "gone", "object": "session.deleted", "deleted": True}
    assert client.get("/v1/sessions/gone").status_code == 404
    assert server.service.vault.residents.forget(("default", "gone")) == 0
    again = chat(client, "my name is Ada", session="gone", headers=key)
    assert again.json()["session"]["version"] == 1
    assert again.json()["id"] != first.json()["id"]
    assert client.get("/v1/sessions/gone/snapshots").json()["data"] == []


@pytest.mark.parametrize("name", ["a/b", "a b", "100%", "%2F", "über", "..", "a/reset", "x" * 256, "?#&"])
def test_any_printable_id_works_in_paths(client: httpx.Client, chat: Chat, name: str) -> None:
    path = f"/v1/sessions/{quote(name, safe='')}" if name != ".." else "/v1/sessions/%2E%2E"
    assert chat(client, "hi", session_id=name).status_code == 200
    if name != "..":  # HTTP clients resolve dots before they send
        assert client.get(path).json()["id"] == name
        assert client.post(f"{path}/reset").json()["id"] == name
        assert client.delete(path).status_code == 200


def test_a_memory_of_another_model_is_refused(
    settings: Any, serve: Any, chat: Chat, model_folder: Any, other_folder: Any
) -> None:
    with serve(settings(models=(str(model_folder), str(other_folder)))) as server, server.client() as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny", "other"]
        chat(client, "hi", session="s")
        wrong = chat(client, "hi", session="s", model="other")
        assert wrong.status_code == 409
        assert wrong.json()["error"]["code"] == "state_mismatch"
        assert "tiny" in wrong.json()["error"]["message"]
        blob = client.get("/v1/sessions/s/export").content
        assert client.put("/v1/sessions/t/import?model=other", content=blob).status_code == 409
        assert content(chat(client, "hi", model="other"))
        assert info(client, "s")["version"] == 1


def test_create(client: httpx.Client, chat: Any) -> None:
    made = client.post("/v1/sessions", json={"id": "made"})
    assert made.status_code == 200, made.text
    assert made.json()["version"] == 1
    assert client.post("/v1/sessions", json={"id": "made"}).status_code == 409
    assert client.post("/v1/sessions", json={"id": "else", "model": "no"}).status_code == 404
    assert client.post("/v1/sessions", json={"id": ""}).status_code == 400
    random = client.post("/v1/sessions").json()["id"]
    assert client.get(f"/v1/sessions/{random}").json()["tokens"] == 0
    fresh, created = (chat(client, "hello", session=name) for name in ("never-made", "made"))
    assert created.json()["session"]["version"] == 2
    assert created.json()["choices"] == fresh.json()["choices"]
    assert created.json()["session"]["digest"] == fresh.json()["session"]["digest"]


def test_huge_version_numbers(client: httpx.Client, chat: Any) -> None:
    chat(client, "hello", session="huge")
    for path, body in (("snapshot", {"version": 10**30}), ("restore", {"version": 10**30})):
        assert client.post(f"/v1/sessions/huge/{path}", json=body).status_code == 400
