"""What people do: teach a fact, lose the server, ask, watch the reply come, go back, compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.web
Open = Callable[..., Any]
GROWTH = """() => {
  window.lengths = [];
  new MutationObserver(() => {
    const last = document.querySelector('#log > li:last-child.model .text');
    if (last && !document.getElementById('stop').hidden) window.lengths.push(last.textContent.length);
  }).observe(document.getElementById('log'), { subtree: true, childList: true, characterData: true });
}"""


def test_a_fact_survives_the_server(start_server: Callable[..., Any], visit: Open) -> None:
    server = start_server()
    tab = visit(server).open("keeps")
    tab.say("My dog is called Rex.")
    server.kill()
    tab.page.fill("#text", "What is my dog called?")
    tab.page.press("#text", "Enter")
    assert "cannot be reached" in tab.notice()
    server.start()
    tab.press("Try again")
    tab.settled(2)
    assert "Rex" in tab.reply()
    tab.wait_for_version(2)
    assert visit(server).open("fresh").say("What is my dog called?").count("Rex") == 0


def test_trying_again_teaches_nothing_twice(visit: Open, server: Any, new_id: str) -> None:
    """The answer was ready and got lost on the way: the second request gets it, and the memory has read it once."""
    tab = visit().open(new_id)
    lost: list[int] = []

    def lose(route: Any) -> None:
        if not lost:
            lost.append(route.fetch().status)  # the server answers and commits; the page never hears of it
            route.abort()
        else:
            route.continue_()

    tab.page.route("**/v1/chat/completions", lose)
    tab.page.fill("#text", "My dog is called Rex.")
    tab.page.press("#text", "Enter")
    assert "teaches nothing twice" in tab.notice()
    tab.press("Try again")
    tab.settled(0)
    tab.wait_for_version(1)
    assert lost == [200]
    with server.client() as http:
        assert http.get(f"/v1/sessions/{new_id}").json()["version"] == 1


def test_the_reply_streams(visit: Open, new_id: str) -> None:
    tab = visit().open(new_id)
    tab.page.evaluate(GROWTH)
    reply = tab.say("My favourite colour is green and my sister lives in Lisbon.")
    lengths = sorted(set(tab.page.evaluate("window.lengths")))
    assert len([length for length in lengths if 0 < length < len(reply)]) >= 3, lengths


def test_stop_leaves_the_memory_alone(visit: Open, new_id: str, server: Any) -> None:
    tab = visit().open(new_id)
    tab.say("My dog is called Rex.")
    tab.wait_for_version(1)
    tab.page.locator("summary", has_text="Options").click()
    tab.page.fill("#length", "4000")
    tab.page.evaluate(
        "window.whole = fetch; window.fetch = (url, o) => window.whole(url, o?.body && String(url)"
        ".endsWith('completions') ? {...o, body: o.body.slice(0, -1) + ',\"ignore_eos\":true}'} : o)"
    )
    tab.page.fill("#text", "Tell me more")
    tab.page.press("#text", "Enter")
    tab.page.wait_for_function("() => document.querySelector('#log > li:last-child .text').textContent.length > 20")
    tab.press("Stop")
    tab.page.locator("#stop").wait_for(state="hidden")
    assert tab.page.input_value("#text") == "Tell me more"
    assert tab.page.locator("#log > li").count() == 2
    with server.client() as http:
        assert http.get(f"/v1/sessions/{new_id}").json()["version"] == 1


def test_compare_with_and_without_memory(visit: Open, new_id: str) -> None:
    tab = visit().open(new_id)
    tab.say("I moved to Lisbon.")
    tab.wait_for_version(1)
    tab.say("Where do I live?", mode="compare")
    halves = tab.page.locator("#log > li").last.locator(".half")
    assert halves.count() == 2
    assert "Lisbon" in halves.first.locator(".tokens").inner_text()
    assert "Lisbon" not in halves.last.locator(".tokens").inner_text()
    assert tab.version() == 1


def test_modes_say_what_they_keep(visit: Open, new_id: str, server: Any) -> None:
    tab = visit().open(new_id)
    tab.say("My dog is called Rex.", mode="read")
    assert "Learned: version 1" in tab.page.locator("#log > li").last.inner_text()
    assert "Rex" in tab.say("What is my dog called?", mode="look")
    assert "nothing was learned" in tab.page.locator("#log > li").last.inner_text()
    tab.page.select_option("#session", "")
    assert "Rex" not in tab.say("What is my dog called?")
    assert "No memory" in tab.page.locator("#log > li").last.inner_text()
    with server.client() as http:
        assert http.get(f"/v1/sessions/{new_id}").json()["version"] == 1


def test_surprise_lies_under_the_text(visit: Open, new_id: str) -> None:
    tab = visit().open(new_id)
    replies: list[Any] = []
    tab.page.on("response", lambda r: r.url.endswith("completions") and replies.append(r))
    text = "My dog is called Zorblax 🐕 naïve."
    tab.say(text)
    asked = tab.page.locator("#log > li.user").last
    assert asked.locator(".tokens").text_content() == text  # nothing lost, nothing added, emoji whole
    bars = asked.locator(".token").evaluate_all("all => all.map(e => Number(e.style.getPropertyValue('--s')))")
    assert all(0 <= bar <= 1 for bar in bars)
    last = [line for line in replies[0].text().splitlines() if line.startswith("data: {")][-1]
    told = json.loads(last.removeprefix("data: "))["session"]["surprise"]
    said = [one["surprise"] for one in told if not one["special"]]
    shown = asked.locator(".numbers li").evaluate_all("all => all.map(e => Number(e.lastChild.textContent))")
    assert sum(shown) == pytest.approx(sum(said), rel=0.01)
    assert bars == pytest.approx([min(one / 10, 1) for one in shown], abs=0.006)
    assert "mean" in asked.locator("summary").inner_text()
    asked.locator("summary").click()
    assert asked.locator(".numbers li").count() == len(bars)
    assert tab.page.locator("#log > li.model .token").count() > 2


def test_two_tabs_of_one_session(visit: Open, new_id: str, server: Any) -> None:
    """The second one to change it hears of it, nothing is overwritten, and he can go on."""
    first = visit().open(new_id)
    first.say("My dog is called Rex.")
    first.wait_for_version(1)
    second = visit(beside=first).open(new_id)
    second.wait_for_version(1)
    second.say("My cat is called Tom.")
    first.page.fill("#text", "What is my dog called?")
    first.page.press("#text", "Enter")
    said = first.notice()
    assert "changed elsewhere" in said
    assert "version 2" in said
    with server.client() as http:
        assert http.get(f"/v1/sessions/{new_id}").json()["version"] == 2
    first.press("Send to version 2")
    first.settled(2)
    assert "Rex" in first.reply()
    first.wait_for_version(3)
    second.press("Reset everything")
    second.answer("")
    assert "Nothing was done" in second.notice()
    second.wait_for_version(3)
