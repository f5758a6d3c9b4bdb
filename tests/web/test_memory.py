"""The inspector: go back in time, reset, branch, keep, carry away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.web
Open = Callable[..., Any]
ASK = "What is my dog called?"


def taught(visit: Open, session: str) -> Any:
    tab = visit().open(session)
    tab.say("My dog is called Rex.")
    tab.wait_for_version(1)
    return tab


def test_reset_and_restore_change_the_answer(visit: Open, new_id: str) -> None:
    tab = taught(visit, new_id)
    assert "Rex" in tab.say(ASK, mode="look")
    tab.press("Reset everything")
    tab.answer("")
    tab.wait_for_version(2)
    assert tab.page.locator(".heat .level td").last.get_attribute("title") == "0"
    assert "Rex" not in tab.say(ASK, mode="look")
    tab.press("v1")
    tab.press("Restore")
    tab.wait_for_version(3)
    assert "from version 1" in tab.page.locator(".card").inner_text()
    assert "Rex" in tab.say(ASK, mode="look")


def test_reset_of_one_level(visit: Open, new_id: str) -> None:
    tab = taught(visit, new_id)
    row = tab.page.locator("#inspector table").first.locator("tbody tr").first
    assert row.locator("th").inner_text() == "fast"
    assert float(row.locator("td").nth(1).inner_text()) > 0
    tab.press("Reset fast")
    tab.press("Cancel")
    assert tab.version() == 1
    tab.press("Reset fast")
    tab.answer("")
    tab.wait_for_version(2)
    assert float(row.locator("td").nth(1).inner_text()) == 0
    assert "Rex" not in tab.say(ASK, mode="look")


def test_branch(visit: Open, new_id: str) -> None:
    tab = taught(visit, new_id)
    tab.say("My cat is called Tom.")
    tab.wait_for_version(2)
    tab.press("v1")
    tab.press("Branch…")
    tab.answer(f"{new_id}-branch")
    tab.page.wait_for_function("id => document.getElementById('session').value === id", arg=f"{new_id}-branch")
    tab.wait_for_version(1)
    assert "Rex" in tab.say(ASK, mode="look")
    assert tab.page.locator("#session option", has_text=f"{new_id}-branch").count() == 1
    tab.page.select_option("#session", new_id)
    tab.wait_for_version(2)


def test_snapshots(visit: Open, new_id: str) -> None:
    tab = taught(visit, new_id)
    tab.press("Snapshot…")
    tab.answer("before the cat")
    table = tab.page.get_by_role("region", name="Snapshots")
    table.wait_for()
    assert "before the cat" in table.inner_text()
    tab.say("My cat is called Tom.")
    tab.wait_for_version(2)
    table.get_by_role("button", name="Restore").click()
    tab.wait_for_version(3)
    assert "from version 1" in tab.page.locator(".card").inner_text()
    table.get_by_role("button", name="Forget").click()
    table.wait_for(state="detached")


def test_export_and_import(visit: Open, new_id: str, tmp_path: Path) -> None:
    tab = taught(visit, new_id)
    with tab.page.expect_download() as download:
        tab.press("Export")
    assert download.value.suggested_filename == "session-v1.safetensors"
    download.value.save_as(tmp_path / "memory.safetensors")
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "memory.safetensors").read_bytes()[:-7])
    tab.choose(f"{new_id}-copy")
    tab.page.get_by_text("has read nothing yet").wait_for()
    tab.page.set_input_files("#import", tmp_path / "broken.safetensors")
    tab.press("Import")
    assert "state blob" in tab.notice()
    tab.page.set_input_files("#import", tmp_path / "memory.safetensors")
    tab.press("Import")
    tab.wait_for_version(1)
    assert "Rex" in tab.say(ASK, mode="look")


def test_the_heat_strip_grows_and_keeps_what_the_server_forgets(visit: Open, new_id: str) -> None:
    tab = visit().open(new_id)
    for number in range(10):  # the server keeps 8
        tab.say(f"My number is {number}.", mode="read")
        tab.wait_for_version(number + 1)
    heads = tab.page.locator(".heat thead th").all_inner_texts()
    assert heads == ["Level", *(f"v{number}" for number in range(1, 11))]
    assert tab.page.locator(".line button:disabled").all_inner_texts() == ["v1", "v2"]
    cells = tab.page.locator(".heat .level td").evaluate_all(
        "all => all.map(e => [e.title, Number(e.style.getPropertyValue('--h'))])"
    )
    assert len(cells) == 10
    assert all(float(title) > 0 for title, _ in cells)
    assert max(heat for _, heat in cells) == 1
    assert len({heat for _, heat in cells}) > 3
    assert tab.page.locator(".heat .part").count() == 4
    tab.page.select_option("#heat-by", "norm")
    norms = [float(t) for t in tab.page.locator(".heat .level td").evaluate_all("all => all.map(e => e.title)")]
    assert norms[-1] > norms[0] > 0


def test_erase(visit: Open, new_id: str, server: Any) -> None:
    tab = taught(visit, new_id)
    tab.press("Erase session…")
    assert "for good" in tab.page.locator("#dialog-text").inner_text()
    tab.page.keyboard.press("Escape")
    assert tab.version() == 1
    tab.press("Erase session…")
    tab.answer("")
    tab.page.get_by_text("has read nothing yet").wait_for()
    with server.client() as http:
        assert http.get(f"/v1/sessions/{new_id}").status_code == 404
