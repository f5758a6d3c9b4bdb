"""A HOPE model served in int8: sessions as ever, and none of them taken for one of the float32 model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx

from server.settings import Settings

Serve = Callable[[Settings], AbstractContextManager[Any]]


def turn(http: httpx.Client, text: str, session: str) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
    return http.post("/v1/chat/completions", json=body, headers={"X-Session-ID": session})


def test_a_session_goes_on_and_stays_with_its_model(
    settings: Callable[..., Settings], serve: Serve, tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path / 'sessions.db'}"
    exact, rounded = settings(store=store), settings(store=store, engine={"quantize": "int8"})
    with serve(rounded) as running, running.client() as http:
        first = turn(http, "My dog is called Rex.", "s")
        assert first.json()["session"]["version"] == 1
    with serve(exact) as running, running.client() as http:
        refused = turn(http, "What is my dog called?", "s")
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "state_mismatch"
    with serve(rounded) as running, running.client() as http:
        again = turn(http, "What is my dog called?", "s")
        assert again.json()["session"]["version"] == 2
