"""The SDK against a real server: each test runs with the blocking and with the async client."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from clients.python import (
    BadRequest,
    Client,
    ConfigError,
    Conflict,
    ConnectionFailed,
    NotAuthorized,
    NotFound,
    ProtocolError,
)

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
NewId = Callable[[], str]


def test_a_turn_is_a_version(call: Any, new_id: NewId) -> None:
    session = call.client.session(new_id())
    first = call(session.chat("My dog is called Rex.", **GREEDY))
    second = call(session.chat("I live in Lisbon.", **GREEDY))
    info = call(session.info())
    assert first.session.version + 1 == second.session.version == info.version
    assert second.session.digest == info.digest != first.session.digest
    assert info.tokens > 0
    assert info.created is not None
    assert second.usage.completion_tokens <= 8
    assert second.finish_reason in {"stop", "length"}


def test_a_streamed_turn_is_the_same_turn(call: Any, new_id: NewId) -> None:
    session, twin = new_id(), new_id()
    call(call.client.session(session).chat("My dog is called Rex.", **GREEDY))
    call(call.client.session(session).fork(twin))
    whole = call(call.client.session(session).chat("What is my dog called?", **GREEDY))
    pieces, reply = call.read(call.client.session(twin).stream("What is my dog called?", **GREEDY))
    assert reply is not None
    assert "".join(pieces) == reply.text == whole.text
    assert (reply.finish_reason, reply.usage) == (whole.finish_reason, whole.usage)
    assert reply.session.digest == whole.session.digest
    assert reply.session.id == twin


def test_without_a_session_nothing_is_remembered(call: Any) -> None:
    reply = call(call.client.chat("My dog is called Rex.", **GREEDY))
    assert reply.session is None
    assert call(call.client.chat("My dog is called Rex.", **GREEDY)).text == reply.text


def test_a_stream_left_early_changes_nothing(call: Any, new_id: NewId) -> None:
    session = call.client.session(new_id())
    before = call(session.chat("hello", **GREEDY)).session
    stream = session.stream("tell me more", temperature=0, max_tokens=2000, extra={"ignore_eos": True})
    call.read(stream, at_most=1)
    with pytest.raises(ProtocolError):
        _ = stream.reply
    deadline = time.monotonic() + 60
    while True:  # the server sees the hang-up at its next step; until then the session is busy
        try:
            after = call(session.chat("hello again", if_version=before.version, **GREEDY)).session
            break
        except Conflict:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert after.version == before.version + 1


def test_the_same_key_is_the_same_turn(call: Any, new_id: NewId) -> None:
    session = call.client.session(new_id())
    once = call(session.chat("I live in Lisbon.", idempotency_key="k1", **GREEDY))
    again = call(session.chat("I live in Lisbon.", idempotency_key="k1", **GREEDY))
    assert (again.text, again.session) == (once.text, once.session)
    assert call(session.info()).version == once.session.version
    with pytest.raises(BadRequest):
        call(session.chat("I live in Porto.", idempotency_key="k1", **GREEDY))


def test_a_turn_on_a_version_that_is_over_is_refused(call: Any, new_id: NewId) -> None:
    session = call.client.session(new_id())
    first = call(session.chat("one", **GREEDY)).session.version
    call(session.chat("two", if_version=first, **GREEDY))
    with pytest.raises(Conflict):
        call(session.chat("three", if_version=first, **GREEDY))


def test_learning_can_be_off(call: Any, new_id: NewId) -> None:
    session = call.client.session(new_id())
    before = call(session.chat("one", **GREEDY)).session
    call(session.chat("two", learn="off", **GREEDY))
    assert call(session.info()).digest == before.digest


def test_snapshots_bring_back_what_was(call: Any, new_id: NewId) -> None:
    session = call.client.session(new_id())
    call(session.chat("My dog is called Rex.", **GREEDY))
    digest = call(session.info()).digest
    kept = call(session.snapshot("before the cat"))
    call(session.chat("My cat is called Tom.", **GREEDY))
    assert [(one.snapshot, one.label) for one in call(session.snapshots())] == [(kept.snapshot, "before the cat")]
    assert call(session.restore(kept.snapshot)).digest == digest
    call(session.delete_snapshot(kept.snapshot))
    assert call(session.snapshots()) == []
    with pytest.raises(NotFound):
        call(session.restore(kept.snapshot))


def test_history_and_versions(call: Any, new_id: NewId) -> None:
    session = call.client.session(new_id())
    first = call(session.chat("one", **GREEDY)).session
    call(session.chat("two", **GREEDY))
    versions = call(session.history())
    assert [v.version for v in versions] == [first.version + 1, first.version]
    assert call(session.restore(version=first.version)).digest == first.digest
    with pytest.raises(ConfigError):
        call(session.restore())


def test_reset_is_a_fresh_memory(call: Any, new_id: NewId) -> None:
    one, other = call.client.session(new_id()), call.client.session(new_id())
    call(one.chat("My dog is called Rex.", **GREEDY))
    call(other.chat("I live in Lisbon, and I like it.", **GREEDY))
    assert call(one.reset()).digest == call(other.reset()).digest
    answers = [call(session.chat("What is my dog called?", **GREEDY)) for session in (one, other)]
    assert answers[0].text == answers[1].text
    with pytest.raises(BadRequest) as error:
        call(one.reset(["no-such-level"]))
    assert error.value.param == "levels"


def test_levels_say_what_is_held(call: Any, new_id: NewId) -> None:
    session = call.client.session(new_id())
    call(session.chat("My dog is called Rex.", **GREEDY))
    levels = call(session.levels())
    assert levels
    assert all(level.bytes > 0 for level in levels)


def test_learn_reads_without_answering(call: Any, new_id: NewId) -> None:
    session = call.client.session(new_id())
    learned = call(session.learn("My dog is called Rex."))
    assert call(session.info()).digest == learned.digest


def test_export_and_import_move_a_memory(call: Any, new_id: NewId) -> None:
    session, copy = call.client.session(new_id()), call.client.session(new_id())
    digest = call(session.chat("My dog is called Rex.", **GREEDY)).session.digest
    blob = call(session.export())
    assert call(copy.import_(blob)).digest == digest
    with pytest.raises(BadRequest):
        call(copy.import_(blob[: len(blob) // 2]))
    assert call(copy.info()).digest == digest


def test_delete_leaves_nothing(call: Any, new_id: NewId) -> None:
    name = new_id()
    session = call.client.session(name)
    call(session.chat("My dog is called Rex.", **GREEDY))
    assert name in {info.id for info in call(call.client.sessions())}
    call(session.delete())
    assert name not in {info.id for info in call(call.client.sessions())}
    with pytest.raises(NotFound):
        call(session.info())


@pytest.mark.parametrize(
    "id", ["user@example.org", "Zoë · 日本", "50% off?", "a b", "x" * 256, "#1&2=3+4", "a/b", "%2F"]
)
def test_any_printable_id_is_one_session(call: Any, id: str) -> None:
    session = call.client.session(id)
    turn = call(session.chat("hello", **GREEDY)).session
    assert (turn.id, call(session.info()).id) == (id, id)
    call(session.delete())


@pytest.mark.parametrize("id", ["", ".", "..", "x" * 257, "two\nlines", "bell\a"])
def test_impossible_ids_are_refused_before_anything_is_sent(call: Any, id: str) -> None:
    with pytest.raises(ConfigError):
        call.client.session(id)


def test_errors_say_what_is_wrong(call: Any, new_id: NewId) -> None:
    session = call.client.session(new_id())
    with pytest.raises(NotFound) as missing:
        call(session.chat("hello", model="no-such-model"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequest) as wrong:
        call(session.chat("hello", temperature=99))
    assert wrong.value.param == "temperature"
    with pytest.raises(NotFound):
        call(session.info())


def test_no_server_is_said_so(connect: Any) -> None:
    call = connect("http://127.0.0.1:9", retries=0)
    with pytest.raises(ConnectionFailed, match="is the server running") as error:
        call(call.client.models())
    assert not error.value.sent


def test_keys_keep_sessions_apart(start_server: Any, tmp_path: Any, new_id: NewId) -> None:
    keys = tmp_path / "keys"
    keys.write_text("red red-key-1234567890\nblue blue-key-1234567890\n")
    url = start_server("--api-key-file", str(keys))
    name = new_id()
    with Client(url, "red-key-1234567890") as red, Client(url, "blue-key-1234567890") as blue, Client(url) as nobody:
        red.session(name).chat("My dog is called Rex.", **GREEDY)
        assert [info.id for info in red.sessions()] == [name]
        assert blue.sessions() == []
        with pytest.raises(NotFound):
            blue.session(name).info()
        with pytest.raises(NotAuthorized):
            nobody.models()


@pytest.mark.parametrize("base_url", ["localhost:8000", "ftp://x", "/v1"])
def test_a_base_url_needs_its_scheme(base_url: str) -> None:
    with pytest.raises(ConfigError, match="http://"):
        Client(base_url)


def test_the_base_url_of_openai_clients_works_too(url: str) -> None:
    with Client(f"{url}/v1/") as client:
        assert [model.id for model in client.models()] == ["tiny"]
