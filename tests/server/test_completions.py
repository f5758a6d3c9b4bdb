"""POST /v1/completions on the real app."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest


def complete(client: httpx.Client, prompt: Any, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "logit_bias": {"4": -100}, **fields}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_text_and_tokens_are_the_same_prompt(client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "hello"
    one = complete(client, "hello")
    assert complete(client, tokens)["choices"] == one["choices"]
    many = complete(client, ["hello", "world"])
    assert [choice["index"] for choice in many["choices"]] == [0, 1]
    assert many["choices"][0]["text"] == one["choices"][0]["text"]
    assert complete(client, [tokens, tokens])["choices"][1]["text"] == one["choices"][0]["text"]
    usage = {"prompt_tokens": 10, "completion_tokens": 16, "total_tokens": 26}
    assert many["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}


def test_scoring_as_lm_eval_does_it(client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"prompt": "abc def"}).json()["tokens"]
    scored = complete(client, tokens, echo=True, logprobs=1, max_tokens=1)["choices"][0]
    logprobs = scored["logprobs"]
    assert scored["text"].startswith("abc def")
    assert len(logprobs["tokens"]) == len(tokens) + 1
    assert logprobs["token_logprobs"][0] is None
    assert all(p <= 0 for p in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"][:3] == [0, 1, 2]
    assert "".join(logprobs["tokens"]) == scored["text"]
    assert all(len(top) in (1, 2) for top in logprobs["top_logprobs"][1:])
    only = complete(client, tokens, echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert only["text"] == "abc def"
    assert only["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]
    greedy = complete(client, tokens, logprobs=2, max_tokens=1)["choices"][0]["logprobs"]
    assert math.isclose(greedy["token_logprobs"][0], logprobs["token_logprobs"][-1], rel_tol=1e-5)


def test_scoring_never_learns(client: httpx.Client) -> None:
    assert complete(client, "hello", session_id="scored")["session"]["version"] == 1
    before = complete(client, "hello", session_id="scored", echo=True, logprobs=1)
    assert before["session"]["version"] == 1
    assert len(before["choices"][0]["logprobs"]["tokens"]) == 5 + 8
    assert before["choices"][0]["logprobs"]["token_logprobs"][0] is not None
    assert complete(client, " more", session_id="scored")["session"]["version"] == 2


def test_a_stream_says_the_same(client: httpx.Client) -> None:
    whole = complete(client, ["hello", "tell"], echo=True)
    body = {"model": "tiny", "prompt": ["hello", "tell"], "max_tokens": 8, "temperature": 0, "stream": True}
    body |= {"logit_bias": {"4": -100}, "echo": True, "stream_options": {"continuous_usage_stats": True}}
    reply = client.post("/v1/completions", json=body)
    texts = ["", ""]
    for line in reply.text.split("\n"):
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_chat_continues_after_a_raw_completion(client: httpx.Client) -> None:
    complete(client, "raw text", session_id="mixed")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "session_id": "mixed"}
    assert client.post("/v1/chat/completions", json=body).json()["session"]["version"] == 2


def test_prompt_logprobs(client: httpx.Client) -> None:
    choice = complete(client, "abcd", prompt_logprobs=2)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert all(2 <= len(entry) <= 3 for entry in choice["prompt_logprobs"][1:])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", "b"], "session_id": "two"}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_bad_requests(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    reply = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", **change})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_offsets_of_a_stream_go_on(client: httpx.Client) -> None:
    ask = {"model": "tiny", "prompt": "Once", "max_tokens": 6, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    whole = client.post("/v1/completions", json=ask).json()["choices"][0]["logprobs"]["text_offset"]
    lines = client.post("/v1/completions", json={**ask, "stream": True}).text.split("\n")
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    offsets = [offset for one in choices if one["logprobs"] for offset in one["logprobs"]["text_offset"]]
    assert offsets == whole
    assert len(set(whole)) == 6
