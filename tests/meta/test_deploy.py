"""Dockerfile, compose.yaml and the Kubernetes example: they agree with the program and with one another.

Linters and schemas of other people: `make lint-deploy`. The image built and started: `make test-container`.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.options import parse
from tools.container import chain, stages

ROOT = Path(__file__).resolve().parents[2]
STAGES = stages((ROOT / "Dockerfile").read_text())
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
KUBERNETES = [one for one in yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()) if one]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def kind(name: str, of: str) -> dict[str, Any]:
    return next(one for one in KUBERNETES if one["kind"] == name and one["metadata"]["name"] == of)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_is_nobodys_and_has_a_health_check(target: str) -> None:
    lines = [line for stage in chain(STAGES, target) for line in stage.lines]
    words = dict(lines)  # the last of each
    assert words["USER"] == "10001"
    assert "/health" in words["HEALTHCHECK"]
    assert words["STOPSIGNAL"] == "SIGTERM"
    assert words["VOLUME"] == "/data"
    built = re.match(r"--from=(\S+)", next(text for word, text in lines if word == "COPY"))
    assert built is not None
    made = [text for stage in chain(STAGES, built[1]) for word, text in stage.lines if word == "RUN"]
    pin = next(one for one in PROJECT["project"]["optional-dependencies"]["serve"] if one.startswith("torch=="))
    assert any(re.search(rf"pip install {re.escape(pin)}\b", one) for one in made), (
        f"the image has another torch than {pin}"
    )


def test_the_default_image_is_the_cpus() -> None:
    assert list(STAGES)[-1] == "cpu"
    assert COMPOSE["services"]["server"]["build"]["target"] == "cpu"


def options_of(command: list[str]) -> Any:
    entry = next(text for stage in reversed(chain(STAGES, "cpu")) if (text := stage.last("ENTRYPOINT")))
    return parse([*yaml.safe_load(entry)[1:], *command])


def test_the_server_knows_the_options_it_is_given() -> None:
    assert options_of(yaml.safe_load(STAGES["runtime"].last("CMD"))).api_key_file == Path("/run/secrets/api_keys")
    assert options_of(COMPOSE["services"]["server"]["command"]).insecure
    pod = kind("Deployment", "nested")["spec"]["template"]["spec"]
    settings = options_of(pod["containers"][0]["args"])
    mounted = Path(pod["containers"][0]["volumeMounts"][0]["mountPath"])
    assert mounted in settings.api_key_file.parents
    assert mounted in settings.admin_key_file.parents


def test_a_server_without_keys_is_reached_from_this_machine_only() -> None:
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["services"]["server"]["ports"])


def test_a_pod_has_time_to_drain() -> None:
    pod = kind("Deployment", "nested")["spec"]["template"]["spec"]
    asleep = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    drains = options_of(pod["containers"][0]["args"]).drain_seconds
    assert pod["terminationGracePeriodSeconds"] > asleep + drains
    assert (
        float(COMPOSE["services"]["server"]["stop_grace_period"].rstrip("s")) > options_of(["--insecure"]).drain_seconds
    )


def test_names_and_labels_meet() -> None:
    deployment = kind("Deployment", "nested")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        kind("Service", "nested")["spec"]["selector"],
        kind("PodDisruptionBudget", "nested")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    assert kind("PodDisruptionBudget", "nested")["spec"]["minAvailable"] < deployment["spec"]["replicas"]
    store = deployment["spec"]["template"]["spec"]["containers"][0]["args"][0]
    assert f"@{kind('Service', 'nested-redis')['metadata']['name']}:6379/" in store


def test_nothing_runs_with_more_than_it_needs() -> None:
    for one in (kind("Deployment", "nested"), kind("StatefulSet", "nested-redis")):
        pod = one["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"]["drop"] == ["ALL"]
    for service in COMPOSE["services"].values():
        assert service["read_only"] is True
    text = (ROOT / "deploy" / "kubernetes.yaml").read_text()
    assert not [one for one in KUBERNETES if one["kind"] == "Secret"], "secrets are made with kubectl, not committed"
    assert "secretKeyRef" in text


REDIS = {
    "compose": COMPOSE["services"]["redis"]["command"],
    "kubernetes": kind("StatefulSet", "nested-redis")["spec"]["template"]["spec"]["containers"][0]["args"],
}


@pytest.mark.redis
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
@pytest.mark.parametrize("name", REDIS)
def test_redis_keeps_memories(name: str, tmp_path: Path) -> None:
    """A real redis-server with the arguments of the file: it starts, appends, and never evicts."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [*REDIS[name], "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        asked = ["AUTH $(REDIS_PASSWORD)"] if "--requirepass" in command else []
        asked += ["CONFIG GET appendonly", "CONFIG GET appendfsync", "CONFIG GET maxmemory-policy"]
        deadline = time.monotonic() + 30
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
                    link.sendall("".join(f"{one}\r\n" for one in asked).encode())
                    answer = b""
                    while b"maxmemory-policy" not in answer or not answer.endswith(b"noeviction\r\n"):
                        answer += link.recv(4096)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        text = answer.decode()
        assert "appendonly\r\n$3\r\nyes" in text
        assert "appendfsync\r\n$8\r\neverysec" in text
    finally:
        process.terminate()
        process.wait(30)
