"""nested-serve: one clear line and exit status 2 for what is wrong, before anything listens."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from nested_runtime.errors import ConfigError
from server.__main__ import main
from server.options import parse


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line a refused start prints."""
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nested-serve: ")]
    assert len(lines) == 1
    return lines[0]


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--port", "many"), "many"),
        (("--port", "99999"), "99999"),
        (("--frobnicate",), "frobnicate"),
        (("--slots", "0"), "slots"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--host", "0.0.0.0"), "--insecure"),
        (("--api-key-file", "/nothing"), "/nothing"),
        (("--ssl-keyfile", "x"), "--ssl-certfile"),
        (("--ray-replicas", "-1"), "-1"),
        (("--ray-replicas", "2"), "redis://..., not memory:"),
        (("--ray-replicas", "2", "--store", "redis://h", "--uds", "/s"), "--uds"),
        (("--ray-replicas", "2", "--store", "redis://h", "--port", "0"), "--port 0"),
        (("--ray-replicas", "2", "--store", "redis://h", "--admin-key-file", "f"), "one more nested-serve"),
    ],
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], model_folder: Path, arguments: tuple[str, ...], says: str
) -> None:
    assert says in refused(capsys, "--model", str(model_folder), "--store", "memory:", *arguments)


def test_a_start_leaves_the_logging_of_its_process_alone(
    capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    refused(capsys, "--model", str(model_folder), "--store", "postgres://x")
    assert (root.handlers, root.level) == before


def test_bad_stores(capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path) -> None:
    alien = tmp_path / "alien.db"
    alien.write_text("this is not a database, it is a long enough text file" * 20)
    model = ("--model", str(model_folder))
    assert "alien.db" in refused(capsys, *model, "--store", f"sqlite:///{alien}")
    assert alien.read_text().startswith("this is not")
    assert "postgres" in refused(capsys, *model, "--store", "postgres://x")


def test_bad_checkpoints(capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path) -> None:
    extra = copy(model_folder, tmp_path / "extra")
    tensors = load_file(extra / "model.safetensors")
    save_file({**tensors, "surplus": tensors["embed"].clone()}, extra / "model.safetensors")
    assert "surplus" in refused(capsys, "--model", str(extra))
    missing = copy(model_folder, tmp_path / "missing")
    save_file({k: v for k, v in tensors.items() if k != "embed"}, missing / "model.safetensors")
    assert "embed" in refused(capsys, "--model", str(missing))
    config = copy(model_folder, tmp_path / "config")
    fields = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps({**fields, "wings": 2}))
    assert "wings" in refused(capsys, "--model", str(config))
    assert "same name" in refused(capsys, "--model", str(model_folder), "--model", str(model_folder))


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in refused(capsys, "--model", str(model_folder), "--store", "memory:", "--port", port)


def test_the_environment_gives_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTED_SLOTS", "3")
    monkeypatch.setenv("NESTED_LEASE_SECONDS", "12.5")
    assert parse([]).engine.slots == 3
    assert parse(["--slots", "5"]).engine.slots == 5
    assert parse([]).sessions.lease_seconds == 12.5
    monkeypatch.setenv("NESTED_SLOTS", "x")
    with pytest.raises(ConfigError, match="NESTED_SLOTS"):
        parse([])


def test_metrics_have_the_names_people_know(serve: Any, settings: Callable[..., Any], chat: Any) -> None:
    with serve(settings(store="memory:")) as server, server.client() as client:
        chat(client, "hi", session="metrics")
        chat(client, "hi", session="metrics", headers={"If-Match": "9"})
        text = client.get("/metrics").text
    for line in (
        'nested_num_requests_running{model="tiny"} 0.0',
        'nested_generation_tokens_total{model="tiny"} 8.0',
        'nested_time_to_first_token_seconds_count{model="tiny"} 1.0',
        'nested_e2e_request_latency_seconds_count{model="tiny"} 1.0',
        "nested_memory_commit_seconds_count 1.0",
        'nested_memory_conflicts_total{code="version_conflict"} 1.0',
        "nested_sessions_resident 1.0",
    ):
        assert line in text
    for name in ("prompt_tokens", "prefix_cache_queries", "num_preemptions"):
        assert f"nested_{name}_total" in text
    for name in ("memory_load_seconds", "memory_bytes", "memory_update_seconds", "update_norm"):
        assert f"nested_{name}" in text


def test_a_unix_socket(serve: Any, settings: Callable[..., Any], tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    transport = httpx.HTTPTransport(uds=path)
    with serve(settings(uds=path)) as server, httpx.Client(transport=transport, base_url=server.url) as client:
        assert client.get("/health").json() == {"status": "ok"}
    assert not Path(path).exists()


def test_cors_and_root_path(serve: Any, settings: Callable[..., Any]) -> None:
    with serve(settings(cors_origins=("https://chat.example",))) as server, server.client() as client:
        asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
        allowed = client.options("/v1/chat/completions", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        refusal = client.options("/v1/chat/completions", headers={**asked, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refusal.headers
