"""POST /v1/sessions/{id}/consolidate and the background worker, on real servers; a SIGKILL in the middle."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from nested_runtime.models.replay import Consolidation
from nested_runtime.store.base import SessionKey
from server.schemas.bodies import Consolidated

Chat = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def leveled(serve: Any, settings: Callable[..., Any], leveled_folder: Path) -> Iterator[Any]:
    with serve(settings(models=(str(leveled_folder),), sessions={"wait_seconds": 60.0})) as server:
        yield server


@pytest.fixture
def http(leveled: Any) -> Iterator[httpx.Client]:
    with leveled.client() as client:
        yield client


def norms(http: httpx.Client, name: str) -> dict[str, float]:
    return {one["level"]: one["norm"] for one in http.get(f"/v1/sessions/{name}/levels").json()["data"]}


@contextmanager
def consolidating(client: httpx.Client, name: str, passes: int) -> Iterator[list[Any]]:
    """A long consolidation in the background; its answer or error, once the block is left."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(client.post(f"/v1/sessions/{name}/consolidate", json={"passes": passes}))
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    yield answers
    thread.join(120)


def test_it_is_a_version_of_its_own_that_can_be_restored_from(http: httpx.Client, chat: Chat) -> None:
    for text in ("my name is Ada and I live in Rome", "I have two dogs"):
        chat(http, text, session="rest")
    before, was = norms(http, "rest"), http.get("/v1/sessions/rest").json()
    done = http.post("/v1/sessions/rest/consolidate", json={"decay": 0.5})
    assert done.status_code == 200, done.text
    assert (done.json()["version"], done.json()["kind"], done.json()["into"]) == (3, "consolidate", ["cms.2"])
    TypeAdapter(Consolidated).validate_python(done.json(), strict=True)
    assert 32 < done.json()["tokens_read"] <= 32 + 8
    assert done.json()["tokens"] == was["tokens"]
    assert [one["kind"] for one in http.get("/v1/sessions/rest/history").json()["data"]] == [
        "consolidate",
        "turn",
        "turn",
    ]
    after = norms(http, "rest")
    assert after["fast"] == before["fast"]
    assert after["cms.1"] == pytest.approx(before["cms.1"] / 2)
    assert after["cms.2"] != before["cms.2"]
    back = http.post("/v1/sessions/rest/restore", json={"version": 2}).json()
    assert (back["digest"], back["version"]) == (was["digest"], 4)


def test_a_conversation_goes_on_and_can_be_regenerated_behind_it(http: httpx.Client, chat: Chat) -> None:
    first = {"role": "user", "content": "my name is Ada and I live in Rome"}
    one = chat(http, first, session="talk").json()
    said = {"role": "assistant", "content": one["choices"][0]["message"]["content"]}
    assert http.post("/v1/sessions/talk/consolidate").json()["version"] == 2
    more = chat(http, first, said, {"role": "user", "content": "where?"}, session="talk").json()["session"]
    assert (more["history"], more["version"]) == ("extended", 3)
    other = chat(http, first, said, {"role": "user", "content": "who am I?"}, session="talk").json()["session"]
    assert (other["history"], other["version"]) == ("branched", 4)


def test_what_cannot_be_consolidated_is_refused_and_changes_nothing(
    http: httpx.Client, client: httpx.Client, chat: Chat
) -> None:
    http.post("/v1/sessions", json={"id": "new"})
    few = http.post("/v1/sessions/new/consolidate")
    assert few.status_code == 400
    assert "keeps 0 recent tokens" in few.json()["error"]["message"]
    assert http.get("/v1/sessions/new").json()["version"] == 1
    chat(client, "hi", session="plain")
    plain = client.post("/v1/sessions/plain/consolidate")
    assert (plain.status_code, "no levels" in plain.json()["error"]["message"]) == (400, True)
    assert http.post("/v1/sessions/never/consolidate").status_code == 404
    for body in ({"passes": 0}, {"decay": 2}, {"speed": 1}):
        assert http.post("/v1/sessions/new/consolidate", json=body).status_code == 400
    assert http.post("/v1/sessions/new/consolidate", headers={"If-Match": "7"}).status_code == 409


def test_a_turn_waits_for_one_that_was_asked_for(leveled: Any, http: httpx.Client, chat: Chat) -> None:
    chat(http, "my name is Ada and I live in Rome", session="wait")
    key = SessionKey("default", "wait")
    with leveled.client() as other, consolidating(other, "wait", 4) as answers:
        deadline = time.monotonic() + 60
        while not leveled.service.vault._waiting[key] and time.monotonic() < deadline:
            time.sleep(0.002)
        turn = chat(http, "who am I?", session="wait")
    assert answers[0].json()["version"] == 2
    assert turn.json()["session"]["version"] == 3


def test_in_the_background_it_gives_way_to_a_turn(leveled: Any, http: httpx.Client, chat: Chat) -> None:
    chat(http, "my name is Ada and I live in Rome", session="yield")
    key, service = SessionKey("default", "yield"), leveled.service
    calls: list[float] = []

    def wanted(_key: SessionKey) -> bool:
        calls.append(time.monotonic())
        return len(calls) > 3

    original, service.vault.is_wanted = service.vault.is_wanted, wanted
    try:
        wish = Consolidation(passes=64)
        assert leveled.run(service.consolidator.consolidate(key, wish, gives_way=True)) is None
    finally:
        service.vault.is_wanted = original
    assert len(calls) == 4, "asked before every piece, ended with the first yes"
    assert http.get("/v1/sessions/yield").json()["version"] == 1


def test_an_idle_server_consolidates_idle_sessions_once(
    serve: Any, settings: Callable[..., Any], leveled_folder: Path, chat: Chat
) -> None:
    sessions = {"consolidate_after": 0.2, "consolidate_decay": 0.5}
    with serve(settings(models=(str(leveled_folder),), sessions=sessions)) as server, server.client() as http:
        chat(http, "my name is Ada and I live in Rome", session="idle")
        deadline = time.monotonic() + 60
        while http.get("/v1/sessions/idle").json()["version"] < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)
        kinds = [one["kind"] for one in http.get("/v1/sessions/idle/history").json()["data"]]
        assert kinds == ["consolidate", "turn"]
        assert chat(http, "who am I?", session="idle").json()["session"]["version"] == 3


def test_killed_in_the_middle_the_session_is_as_before(
    process: Callable[..., Any], leveled_folder: Path, tmp_path: Path, chat: Chat
) -> None:
    store = f"sqlite:///{tmp_path / 's.db'}"
    server = process("--model", str(leveled_folder), "--store", store, "--lease-seconds", "10")
    with server.client() as http:
        chat(http, "my name is Ada and I live in Rome", session="killed")
        before = http.get("/v1/sessions/killed").json()
        with server.client() as other, consolidating(other, "killed", 64) as answers:
            time.sleep(0.2)
            server.stop(signal.SIGKILL)
    assert isinstance(answers[0], httpx.HTTPError), "it was over before the kill"
    again = process("--model", str(leveled_folder), "--store", store, "--lease-seconds", "10")
    with again.client() as http:
        after = http.get("/v1/sessions/killed").json()
        assert (after["version"], after["digest"]) == (before["version"], before["digest"])
        done = http.post("/v1/sessions/killed/consolidate")  # waits until the dead server's lease is over
        assert done.json().get("version") == 2, done.text
