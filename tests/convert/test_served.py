"""A converted checkpoint behind the server: its chat template, its tokens, its greedy text, its sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

from nested_runtime.config import EngineConfig
from nested_runtime.convert.cli import convert
from nested_runtime.convert.levels import Stack
from server.app import create_app, running
from server.assembly import assemble
from server.settings import Settings

Checkpoint = Callable[[str], tuple[Path, Any]]
USER = [{"role": "user", "content": "hello there"}]


async def ask(folder: Path, calls: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    settings = Settings(models=(str(folder),), store="memory:", engine=EngineConfig(slots=2, threads=1))
    service = assemble(settings)
    async with running(service):
        transport = httpx.ASGITransport(app=create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://nested", timeout=60) as client:
            replies = [await client.post(path, json={"model": "m", **body}) for path, body in calls]
    assert [reply.status_code for reply in replies] == [200] * len(replies), replies[-1].text
    return [reply.json() for reply in replies]


@pytest.fixture
def served(tmp_path: Path, checkpoint: Checkpoint, request: pytest.FixtureRequest) -> tuple[Path, Any, Any]:
    """Our folder, with levels of step size 0, transformers' model and tokenizer."""
    folder, theirs = checkpoint(getattr(request, "param", "llama3"))
    convert(folder, tmp_path / "m", {}, "m", Stack((16,), rank=2, rate=0.0))
    return tmp_path / "m", theirs, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("served", ["llama3", "mistral", "qwen2", "qwen3", "smollm", "gemma", "gemma3"], indirect=True)
def test_chat_equals_generate_with_the_checkpoints_template(served: tuple[Path, Any, Any]) -> None:
    folder, theirs, tokenizer = served
    ids = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    whole = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    body = {"messages": USER, "max_tokens": 12, "temperature": 0}
    (rendered, reply) = asyncio.run(ask(folder, [("/tokenize", {"messages": USER}), ("/v1/chat/completions", body)]))
    assert rendered["tokens"] == ids[0].tolist()
    text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert reply["choices"][0]["message"]["content"] == text


def test_a_session_reads_only_the_new_message_and_answers_as_over_the_whole(served: tuple[Path, Any, Any]) -> None:
    """Two turns, the second with nothing but its new message: what transformers says to both, end to end."""
    folder, theirs, tokenizer = served
    options = {"max_tokens": 6, "temperature": 0, "session_id": "s"}
    second = [{"role": "user", "content": "how are you?"}]
    calls = [("/v1/chat/completions", {"messages": m, **options}) for m in (USER, second)]
    replies = asyncio.run(ask(folder, calls))
    ids = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    ids = theirs.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    rest = "<|im_end|>\n<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n"
    rest = rest.removeprefix("<|im_end|>") if int(ids[0, -1]) == 2 else rest
    ids = torch.cat([ids, torch.tensor([tokenizer.encode(rest)])], dim=1)
    whole = theirs.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert replies[1]["choices"][0]["message"]["content"] == text
    assert replies[1]["usage"]["prompt_tokens"] < ids.shape[1] - 10
    taken = [reply["session"]["updates"] for reply in replies]  # of levels of chunk 16; the last token is not read yet
    assert sum(taken) == (len(whole[0]) - 2) // 16


def test_a_resent_conversation_is_not_read_twice(served: tuple[Path, Any, Any]) -> None:
    folder, _, _ = served
    options = {"max_tokens": 6, "temperature": 0}
    first, again = "/v1/chat/completions", {"role": "user", "content": "how are you?"}

    async def both() -> tuple[dict[str, Any], dict[str, Any]]:
        said = (await ask(folder, [(first, {"messages": USER, **options})]))[0]["choices"][0]["message"]["content"]
        whole = [*USER, {"role": "assistant", "content": said}, again]
        calls = [(first, {"messages": m, "session_id": "s", **options}) for m in (USER, whole)]
        short = [(first, {"messages": m, "session_id": "t", **options}) for m in (USER, [again])]
        return (await ask(folder, calls))[1], (await ask(folder, short))[1]

    resent, only_new = asyncio.run(both())
    assert resent["usage"]["prompt_tokens"] == only_new["usage"]["prompt_tokens"]
    assert resent["choices"][0]["message"] == only_new["choices"][0]["message"]
