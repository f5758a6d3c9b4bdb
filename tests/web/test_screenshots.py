"""The pictures of docs/images: `make screenshots` writes them there, any other run into a temporary folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.web
Open = Callable[..., Any]
ADMIN_KEY = "admin-key-of-the-web-tests"
FACTS = ("My dog is called Rex.", "I moved to Lisbon.", "My favourite colour is green.", "My sister works as a nurse.")
MAX_BYTES = 300_000


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("NESTED_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def take(tab: Any, pictures: Path, name: str) -> None:
    tab.page.evaluate("document.activeElement.blur()")
    path = pictures / f"{name}.png"
    tab.page.screenshot(path=path, animations="disabled")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert 10_000 < path.stat().st_size < MAX_BYTES


def test_pictures(visit: Open, start_server: Callable[..., Any], pictures: Path) -> None:
    server = start_server()
    tab = visit(server).open("alice")
    tab.page.set_viewport_size({"width": 1280, "height": 860})
    for number, fact in enumerate(FACTS, 1):
        tab.say(fact)
        tab.wait_for_version(number)
    tab.say("What is my dog called?", mode="compare")
    tab.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    take(tab, pictures, "chat")
    tab.press("v2")
    tab.press("Snapshot…")
    tab.answer("before the sister")
    tab.page.emulate_media(color_scheme="dark")
    tab.page.get_by_role("link", name="Memory").click()
    tab.page.get_by_role("region", name="Snapshots").wait_for()
    take(tab, pictures, "inspector")
    tab.page.emulate_media(color_scheme="light")
    with server.client() as http:
        for name in ("bert", "carla"):
            http.post(f"/v1/sessions/{name}/learn", json={"text": FACTS[0]}).raise_for_status()
    tab.page.get_by_role("link", name="Admin").click()
    tab.press("Admin key…")
    tab.answer(ADMIN_KEY)
    tab.page.get_by_role("region", name="Sessions of all tenants").get_by_text("carla").wait_for()
    take(tab, pictures, "admin")
