"""The nested-eval command: tables, files, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nested_runtime.evals.cli import main


def run(capsys: pytest.CaptureFixture[str], out: Path, *argv: str) -> tuple[str, dict[str, Any]]:
    main([*argv, "--out", str(out)])
    (path,) = out.iterdir()
    return capsys.readouterr().out, json.loads(path.read_text(encoding="utf-8"))


def test_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path) -> None:
    options = ("--model", str(folder), "--sessions", "2", "--facts", "2", "--seed", "7")
    table, body = run(capsys, tmp_path, "update", *options)
    assert "2 facts: corrected" in table
    assert body["command"].startswith(f"nested-eval update --model {folder}")
    assert body["options"]["seed"] == 7
    assert body["model"]["name"] == "tiny-hope"
    assert len(body["model"]["fingerprint"]) == 32
    assert {row["name"] for row in body["rows"]} == {"2 facts: corrected", "2 facts"}
    assert len(body["items"]) == 4
    assert all(row["control_share"] == 0.0 and row["low"] == 0.0 < row["high"] for row in body["rows"])


def test_a_server_and_a_secret(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path, server_url: str
) -> None:
    options = ("--sessions", "2", "--facts", "2", "--limit", "3")
    key = ("--api-key", "sesame")
    _, there = run(
        capsys, tmp_path / "there", "recall", *options, "--base-url", server_url, *key, "--model", "tiny-hope"
    )
    _, here = run(capsys, tmp_path / "here", "recall", *options, "--model", str(folder))
    assert "sesame" not in json.dumps(there)
    fields = ("question", "expected", "answer", "right", "control")
    assert [[one[f] for f in fields] for one in there["items"]] == [[one[f] for f in fields] for one in here["items"]]
    assert len(here["items"]) == 3


def test_int8_is_another_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path) -> None:
    options = ("recall", "--model", str(folder), "--sessions", "1", "--facts", "2")
    _, exact = run(capsys, tmp_path / "float32", *options)
    _, rounded = run(capsys, tmp_path / "int8", *options, "--quantize", "int8")
    assert rounded["model"]["fingerprint"] != exact["model"]["fingerprint"]
    assert rounded["options"]["quantize"] == "int8"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["recall", "--model", "nobody"], "unknown model 'nobody'"),
        (["recall", "--facts", "0"], "'0' is not a whole number over 0"),
        (["recall", "--filler-tokens", "-5"], "--filler-tokens"),
        (["recall", "--split", "train"], "invalid choice: 'train'"),
        (["recall", "--base-url", "http://127.0.0.1:9"], "is nested-serve running there?"),
        (["recall", "--base-url", "nowhere"], "nowhere"),
        (["recall", "--base-url", "http://127.0.0.1:9", "--quantize", "int8"], "started with its own"),
        (["recall", "--data", "/nowhere", "--model", "{folder}"], "/nowhere is not a folder"),
        (["everything"], "invalid choice: 'everything'"),
        ([], "required"),
    ],
)
def test_what_is_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path, argv: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main([word.format(folder=folder) for word in argv])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_an_unknown_model_of_a_server(capsys: pytest.CaptureFixture[str], server_url: str) -> None:
    with pytest.raises(SystemExit):
        main(["recall", "--base-url", server_url, "--model", "nobody"])
    assert "it serves: tiny-hope" in capsys.readouterr().err
