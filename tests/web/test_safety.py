"""Keys, and text that would like to be code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.web
Open = Callable[..., Any]
KEY = "key-of-the-web-tests"
ADMIN_KEY = "admin-key-of-the-web-tests"
WATCH = "document.addEventListener('securitypolicyviolation', e => (window.violations ??= []).push(e.blockedURI))"


def test_text_stays_text(visit: Open, server: Any, hostile: str) -> None:
    """In messages, replies, session ids, snapshot labels, model names, errors and the admin view."""
    tab = visit()
    tab.page.add_init_script(WATCH)
    tab.open(f"{hostile}-session")
    tab.page.locator("details summary", has_text="Options").click()
    assert hostile in tab.page.locator("#model option").all_inner_texts()
    tab.page.select_option("#model", hostile)
    tab.say(f"My dog is called {hostile}.")
    tab.wait_for_version(1)
    assert hostile in tab.page.locator("#log").inner_text()
    assert tab.fact("Model") == hostile
    tab.press("Snapshot…")
    tab.answer(hostile)
    tab.page.get_by_role("region", name="Snapshots").get_by_text(hostile).wait_for()
    tab.press("Branch…")
    tab.answer(f"{hostile}-session")  # exists: the error names it
    assert hostile in tab.notice()
    echo = {"choices": [{"index": 0, "delta": {"content": hostile}, "logprobs": None, "finish_reason": "stop"}]}
    body = f"data: {__import__('json').dumps(echo)}\n\ndata: [DONE]\n\n"
    tab.page.route("**/v1/chat/completions", lambda r: r.fulfill(body=body, content_type="text/event-stream"))
    tab.page.select_option("#session", "")
    assert tab.say("say something bad") == hostile  # a model may write anything
    tab.page.unroute("**/v1/chat/completions")
    open_admin(tab)
    assert f"{hostile}-session" in tab.page.locator("#admin-view").inner_text()
    assert tab.page.locator("img, main script").count() == 0
    assert tab.page.evaluate("window.pwned") is None
    assert tab.page.evaluate("window.violations ?? []") == []


def test_the_browser_would_refuse_what_escaped(visit: Open) -> None:
    """The second wall: inline code and HTML from strings are blocked, so the first test means something."""
    tab = visit().open()
    refused = tab.page.evaluate(
        """() => { try { document.body.insertAdjacentHTML('beforeend', '<b>x</b>'); return false; }
                   catch (error) { return error.name; } }"""
    )
    assert refused == "TypeError"
    tab.errors.clear()  # it was reported, as it should


def open_admin(tab: Any, key: str = ADMIN_KEY) -> None:
    tab.page.get_by_role("link", name="Admin").click()
    tab.press("Admin key…")
    tab.answer(key)
    tab.page.get_by_role("region", name="Sessions of all tenants").wait_for()


def enter_key(tab: Any, asked: str, key: str) -> None:
    tab.page.get_by_text(asked).wait_for()
    tab.page.fill("#dialog-input", key)
    tab.page.keyboard.press("Enter")


def test_the_key_stays_in_the_tab(start_server: Callable[..., Any], visit: Open, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"anne {KEY}\n")
    server = start_server("--api-key-file", str(keys))
    tab = visit(server)
    urls: list[str] = []
    tab.page.on("request", lambda request: urls.append(request.url))
    tab.page.goto(f"{server.url}/")
    enter_key(tab, "The server asks for a key", "a-wrong-key-indeed")
    tab.page.get_by_text("The server does not know this key").wait_for()
    assert tab.page.get_attribute("#dialog-input", "type") == "password"
    tab.answer(KEY)
    tab.page.locator("#model option").first.wait_for(state="attached")
    tab.choose("locked")
    assert tab.say("My dog is called Rex.")
    tab.wait_for_version(1)
    tab.page.reload()
    tab.wait_for_version(1)  # the tab still has it
    assert KEY not in "".join(urls) + tab.page.content()
    assert tab.page.evaluate("localStorage.length") == 0
    assert tab.page.context.cookies() == []
    other = visit(beside=tab)
    other.page.goto(f"{server.url}/")
    other.page.locator("#dialog").wait_for(state="visible")  # another tab has not
    assert other.page.evaluate("sessionStorage.getItem('nested.key')") is None
    tab.press("API key…")
    enter_key(tab, "Needed if", "")
    tab.page.get_by_text("The server asks for a key").wait_for()  # forgotten, and asked for again
    assert tab.page.evaluate("sessionStorage.getItem('nested.key')") is None


def test_admin_shows_and_erases(visit: Open, server: Any, new_id: str) -> None:
    tab = visit().open(new_id)
    tab.say("My dog is called Rex.")
    tab.page.get_by_role("link", name="Admin").click()
    tab.press("Admin key…")
    tab.answer("not-the-admin-key")
    tab.page.get_by_text("the admin key is missing or wrong").wait_for()
    tab.page.get_by_role("link", name="Chat").click()
    open_admin(tab)
    row = tab.page.locator("#admin-view tbody tr", has=tab.page.locator("th", has_text=new_id))
    assert row.locator("td").nth(1).inner_text() == "1"
    text = tab.page.locator("#admin-view").inner_text()
    for words in ("Slots: 0 of 16 used", "Queue", "Durability", "fsynced"):
        assert words in text
    tab.press(f"Erase {new_id} of default")
    tab.answer("")
    row.wait_for(state="detached")
    with server.client() as http:
        assert http.get(f"/v1/sessions/{new_id}").status_code == 404


def test_without_an_admin_key_the_view_says_so(start_server: Callable[..., Any], visit: Open, server: Any) -> None:
    tab = visit()
    tab.page.route("**/admin/**", lambda route: route.fulfill(status=404, json={"error": {"message": "off"}}))
    tab.open(view="admin")
    tab.page.get_by_text("started without an admin key").wait_for()
