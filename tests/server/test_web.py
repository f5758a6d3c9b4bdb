"""The web page as the server gives it: open without a key, locked down by headers, free of other hosts."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

WEB = Path(__file__).resolve().parents[2] / "clients" / "web"
FILES = sorted(path.name for path in WEB.iterdir())
PATHS = ["/" if name == "index.html" else f"/web/{name}" for name in FILES]


@pytest.fixture(scope="module")
def locked(serve: Any, settings: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("anne key-of-anne\n")
    with serve(settings(api_key_file=keys)) as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
def test_the_files_are_open_and_nothing_else_is(locked: Any, path: str) -> None:
    with locked.client() as http:
        reply = http.get(path)
        assert reply.status_code == 200
        assert reply.content == (WEB / (path.rpartition("/")[2] or "index.html")).read_bytes()
        assert http.get(f"{path.rstrip('/')}/x").status_code == 401
        assert http.post(path).status_code in (401, 405)
        assert http.get("/v1/models").status_code == 401


@pytest.mark.parametrize("path", PATHS)
def test_the_headers_let_it_load_nothing_else(client: httpx.Client, path: str) -> None:
    reply = client.get(path)
    directives = {line.split()[0]: line.split()[1:] for line in reply.headers["content-security-policy"].split(";")}
    assert directives["default-src"] == ["'none'"]
    assert directives["frame-ancestors"] == directives["base-uri"] == directives["form-action"] == ["'none'"]
    assert directives["trusted-types"] == ["'none'"]
    allowed = {source for sources in directives.values() for source in sources}
    assert allowed == {"'none'", "'self'", "'script'"}
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"


def test_it_is_cached_by_content(client: httpx.Client) -> None:
    tag = client.get("/").headers["etag"]
    again = client.get("/", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host_or_parses_text_as_html(name: str) -> None:
    text = (WEB / name).read_text(encoding="utf-8")
    hosts = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
    assert not hosts
    dangers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|javascript:"
    assert not re.search(dangers, text)
    if name.endswith(".html"):
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)


def exports(module: str) -> set[str]:
    text = (WEB / module).read_text(encoding="utf-8")
    return set(re.findall(r"^export (?:async )?(?:function\*? |const |class )(\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_modules_import_what_others_export_and_find_their_elements(name: str) -> None:
    text = (WEB / name).read_text(encoding="utf-8")
    page = (WEB / "index.html").read_text(encoding="utf-8")
    for names, module in re.findall(r'^import \{([^}]*)\} from "\./([\w.]+)";', text, re.MULTILINE):
        exported = exports(module)
        assert {one.strip() for one in names.split(",")} <= exported, module
    for alias, module in re.findall(r'^import \* as (\w+) from "\./([\w.]+)";', text, re.MULTILINE):
        exported = exports(module)
        assert set(re.findall(rf"(?<![/\w]){alias}\.(\w+)", text)) <= exported, module
    for name_of_element in re.findall(r'byId\("([\w-]+)"\)', text):
        assert f'id="{name_of_element}"' in page, name_of_element


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_modules_are_javascript(name: str) -> None:
    command = ["node", "--input-type=module", "--check", "-"]
    done = subprocess.run(command, input=(WEB / name).read_bytes(), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_it_can_be_left_out(serve: Any, settings: Callable[..., Any]) -> None:
    with serve(settings(web=False)) as server, server.client() as http:
        assert http.get("/").status_code == 404
        assert http.get("/web/app.js").status_code == 404
        assert http.get("/health").status_code == 200


def test_the_wheel_has_the_files(tmp_path: Path) -> None:
    hatchling = pytest.importorskip("hatchling.build", reason="hatchling is not installed here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(WEB.parents[1])
        wheel = hatchling.build_wheel(str(tmp_path))
    names = set(zipfile.ZipFile(tmp_path / wheel).namelist())
    assert {f"clients/web/{name}" for name in FILES} <= names
