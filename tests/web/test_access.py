"""For everybody: keyboard alone, a narrow phone, light and dark, and what axe-core has to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.web
Open = Callable[..., Any]
ADMIN_KEY = "admin-key-of-the-web-tests"
ACTIVE = "(document.activeElement.textContent || document.activeElement.id).trim()"
OUTSIDE = """all => all.filter(e => !e.closest('.scroll'))
  .map(e => [e.id || e.textContent, e.getBoundingClientRect()])
  .filter(([, box]) => box.left < 0 || box.right > 360 || box.height < 24 || box.width < 24)"""
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])


def tab_to(page: Any, name: str, key: str = "Tab") -> None:
    """Press Tab until something of this name or id has the focus."""
    for _ in range(60):
        page.keyboard.press(key)
        found = page.evaluate(f"[{ACTIVE}, document.activeElement.id]")
        if name in found:
            assert page.evaluate("document.activeElement.matches(':focus-visible')")
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"{name} shows no focus"
            return
    raise AssertionError(f"the keyboard does not get to {name!r}")


def test_keyboard_only(visit: Open, new_id: str) -> None:
    tab = visit().open()
    page = tab.page
    page.keyboard.press("Tab")
    assert page.evaluate(ACTIVE) == "Skip to content"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    tab_to(page, "New…")
    page.keyboard.press("Enter")
    page.keyboard.type(new_id)
    page.keyboard.press("Enter")
    page.wait_for_function("id => document.getElementById('session').value === id", arg=new_id)
    tab_to(page, "text")
    page.keyboard.type("My dog is called Rex.")
    page.keyboard.press("Enter")
    tab.settled(0)
    tab.wait_for_version(1)
    page.keyboard.type("What is my dog called?")  # the focus is still in the message
    tab_to(page, "mode")
    page.keyboard.press("ArrowDown")
    tab_to(page, "send")
    page.keyboard.press("Enter")
    tab.settled(2)
    assert "Rex" in tab.reply()
    tab_to(page, "Reset everything")
    page.keyboard.press("Enter")
    page.locator("#dialog").wait_for(state="visible")
    page.keyboard.press("Escape")
    page.locator("#dialog").wait_for(state="hidden")
    assert page.evaluate(ACTIVE) == "Reset everything"  # back where it was
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    tab.wait_for_version(2)
    tab_to(page, "v1")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.activeElement.getAttribute('aria-pressed') === 'true'")
    tab_to(page, "Restore")
    page.keyboard.press("Enter")
    tab.wait_for_version(3)


def prepared(visit: Open, session: str, **options: Any) -> Any:
    """A page with something in every view."""
    tab = visit(**options).open(session)
    tab.say("My dog is called Rex.")
    tab.say("What is my dog called?", mode="compare")
    tab.page.get_by_role("link", name="Admin").click()
    tab.press("Admin key…")
    tab.answer(ADMIN_KEY)
    tab.page.get_by_role("region", name="Sessions of all tenants").wait_for()
    return tab


def test_360_pixels_wide(visit: Open, new_id: str) -> None:
    tab = prepared(visit, new_id * 4)  # a long name too
    tab.page.set_viewport_size({"width": 360, "height": 640})
    for view in ("chat", "memory", "admin"):
        tab.page.get_by_role("link", name=view.capitalize()).click()
        tab.page.locator(f"#{view}").wait_for(state="visible")
        assert tab.page.evaluate("document.scrollingElement.scrollWidth") <= 360, view
        for name in ("chat", "memory", "admin"):
            assert tab.page.locator(f"#{name}").is_visible() == (name == view)
        outside = tab.page.locator("button:visible, select:visible, input:visible, textarea:visible").evaluate_all(
            OUTSIDE
        )
        assert not outside, (view, outside)
    tab.press("New…")
    box = tab.page.locator("#dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    tab.page.keyboard.press("Escape")
    tab.page.get_by_role("link", name="Chat").click()
    assert "Rex" in tab.say("What is my dog called?", mode="look")


@SCHEMES
def test_axe_finds_nothing_serious(visit: Open, new_id: str, axe: str, scheme: str) -> None:
    tab = prepared(visit, new_id, color_scheme=scheme, bypass_csp=True)
    page = tab.page
    page.evaluate(axe)
    found: list[str] = []

    def look(where: str) -> None:
        result = page.evaluate("axe.run(document, { resultTypes: ['violations', 'incomplete'] })")
        assert len(result["passes"]) > 10, "axe looked at nothing"
        found.extend(
            f"{where}: {one['id']} ({one['impact']}): {[node['target'] for node in one['nodes']][:3]}"
            for one in result["violations"]
            if one["impact"] in ("serious", "critical", "moderate")
        )

    for view in ("chat", "memory", "admin"):
        page.get_by_role("link", name=view.capitalize()).click()
        page.locator(f"#{view}").wait_for(state="visible")
        look(view)
    page.get_by_role("link", name="Chat").click()
    page.locator("#log summary").first.click()
    tab.press("New…")
    look("dialog")
    page.keyboard.press("Escape")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#text", "x")
    page.press("#text", "Enter")
    assert tab.notice()
    look("notice")
    assert not found, "\n".join(found)


@SCHEMES
def test_the_page_follows_the_scheme(visit: Open, scheme: str) -> None:
    tab = visit(color_scheme=scheme).open()
    colour = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in colour[4:-1].split(",")[:3]) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60
