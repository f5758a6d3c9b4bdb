"""TLS, a path prefix, keep-alive comments, JSON logs."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

Chat = Callable[..., httpx.Response]
ASK = {"model": "tiny", "max_tokens": 4, "temperature": 0, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Key and certificate of 127.0.0.1, signed by itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program to make a certificate with")
    key, made = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ("-subj", "/CN=nested", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2")
    kind = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    command = [openssl, *kind, *subject, "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return key, made


def test_tls_a_prefix_and_json_logs(
    process: Any, model_folder: Path, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    key, made = certificate
    tls = ("--ssl-keyfile", str(key), "--ssl-certfile", str(made))
    admin = tmp_path / "admin"
    admin.write_text("key-of-the-admin")
    options = ("--store", "memory:", "--root-path", "/nested", "--log-format", "json", "--admin-key-file", str(admin))
    server = process("--model", str(model_folder), *tls, *options)
    assert server.url.startswith("https://")
    trusting = ssl.create_default_context(cafile=made)
    with server.client(verify=trusting) as client:
        told = {"X-Session-ID": "a-secret-name", "X-Request-Id": "my-request"}
        assert client.post("/v1/chat/completions", json=ASK, headers=told).status_code == 200
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/nested"}]
        assert client.get("/health").status_code == 200
        assert client.get("/admin/stats").status_code == 401  # the prefix is no way around a key
        assert client.get("/nested/admin/stats").status_code in (401, 404)
    with server.client() as stranger, pytest.raises(httpx.ConnectError):
        stranger.get("/health")  # an unknown certificate is refused by the client: it really is TLS
    plain = server.url.replace("https", "http")
    with httpx.Client() as client, pytest.raises(httpx.HTTPError):
        client.get(f"{plain}/health").raise_for_status()
    lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    turn = next(line for line in lines if line.get("request") == "my-request")
    assert turn["route"].endswith("/chat/completions")
    assert turn["status"] == 200
    assert turn["method"] == "POST"
    assert len(turn["session"]) == 12
    assert "a-secret-name" not in server.log()
    assert "hello" not in server.log()


def test_comments_keep_a_quiet_stream_open(settings: Callable[..., Any], serve: Any) -> None:
    quiet = settings(keep_alive=0.001, engine={"max_batch_tokens": 16})
    long = {**ASK, "messages": [{"role": "user", "content": "much to read " * 120}], "stream": True}
    with serve(quiet) as server, server.client() as client:
        text = client.post("/v1/chat/completions", json=long).text
    assert text.count(": keep-alive\n\n") > 3
    events = [event for event in text.split("\n\n") if event and not event.startswith(": ")]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
