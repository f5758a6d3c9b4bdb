"""LangChain, LlamaIndex, LiteLLM, simonw/llm and openai-node: one conversation, the same memory as over plain HTTP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import CLIENTS, HERE, KEY, TURNS, Run, installed

Check = Callable[[str, str], None]


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("langchain", "langchain_chat.py"),
        ("llama-index", "llama_index_chat.py"),
        ("litellm", "litellm_chat.py"),
    ],
)
def test_python_clients(run: Run, had_the_conversation: Check, name: str, program: str) -> None:
    python = installed(name)
    output = run(python, HERE / "programs" / program, SESSION=name, TURNS=json.dumps(TURNS))
    had_the_conversation(output, name)


def test_openai_node(run: Run, had_the_conversation: Check, tmp_path: Path) -> None:
    node = shutil.which("node")
    modules = CLIENTS / "node" / "node_modules"
    if node is None or not modules.is_dir():
        pytest.skip("openai-node is not installed; `make test-compat` installs it where node and npm are")
    (tmp_path / "node_modules").symlink_to(modules)
    program = shutil.copy(HERE / "programs" / "chat.mjs", tmp_path)
    had_the_conversation(run(node, program, SESSION="node", TURNS=json.dumps(TURNS)), "node")


def test_llm(server: Any, run: Run, had_the_conversation: Check, tmp_path: Path) -> None:
    llm = installed("llm", "llm")
    model = {"model_id": "mine", "model_name": "tiny", "api_base": f"{server.url}/v1", "api_key_name": "mine"}
    model["headers"] = {"X-Session-ID": "llm"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML
    (tmp_path / "keys.json").write_text(json.dumps({"mine": KEY}))
    replies = []
    for number, turn in enumerate(TURNS):
        options = ("-o", "temperature", "0", "-o", "max_tokens", "12", "-m", "mine")
        going_on = ("-c",) if number else ()
        output = run(llm, "prompt", turn, *options, *going_on, LLM_USER_PATH=str(tmp_path))
        replies.append(output.removesuffix("\n"))
    had_the_conversation(json.dumps(replies), "llm")
