"""GET /v1/models, tokenize, detokenize and what else describes a model."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Query
from pydantic import Field

from nested_runtime.errors import RequestError
from nested_runtime.sessions import ServedModel

from ..deps import Service, ServiceDep
from ..schemas.chat import Message, text_of
from ..schemas.common import Strict

__all__ = ["root_router", "router"]

router = APIRouter(tags=["models"])
root_router = APIRouter(tags=["models"])


def _card(model: ServedModel, created: int) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": created,
        "owned_by": "nested-runtime",
        "max_model_len": model.backend.max_context,
        "fingerprint": model.backend.fingerprint,
    }


@router.get("/models")
async def list_models(service: ServiceDep) -> dict[str, Any]:
    """The models of this server."""
    models = service.runtime.models.values()
    return {"object": "list", "data": [_card(model, service.started) for model in models]}


@router.get("/models/{id:path}")
async def get_model(id: str, service: ServiceDep) -> dict[str, Any]:
    """One model."""
    return _card(service.model(id), service.started)


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def _chosen(service: Service, name: str | None) -> ServedModel:
    return service.model(name) if name is not None else next(iter(service.runtime.models.values()))


@root_router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> dict[str, Any]:
    """Token ids of a text or conversation."""
    model = _chosen(service, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if body.messages is not None:
        messages = [{"role": m.role, "content": text_of(m.content, "messages")} for m in body.messages]
        tokens = model.tokenizer.render(messages, body.add_generation_prompt)
    else:
        tokens = model.tokenizer.encode(body.prompt or "")
    reply: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": model.backend.max_context}
    if body.return_token_strs:
        reply["token_strs"] = [model.tokenizer.token(token) for token in tokens]
    return reply


@root_router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> dict[str, Any]:
    """Text of token ids."""
    model = _chosen(service, body.model)
    for token in body.tokens:
        if not 0 <= token < model.tokenizer.vocab_size:
            raise RequestError(f"token {token} is not in 0..{model.tokenizer.vocab_size - 1}", param="tokens")
    return {"prompt": model.tokenizer.decode(body.tokens)}


@root_router.get("/tokenizer_info")
async def tokenizer_info(service: ServiceDep, model: str | None = Query(None)) -> dict[str, Any]:
    """Vocabulary size and special tokens, under vLLM's names too. A prompt that spells one of them is plain text."""
    tokenizer = _chosen(service, model).tokenizer
    return {
        "eos_token": tokenizer.token(tokenizer.end_id),
        "bos_token": None,
        "pad_token": tokenizer.token(0),
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "end_token_id": tokenizer.end_id,
        "special_tokens": {tokenizer.token(token): token for token in sorted(tokenizer.special_ids)},
    }


@root_router.get("/version")
async def get_version(service: ServiceDep) -> dict[str, str]:
    """The release, what runs the models, and the durability a reply promises."""
    try:
        release = version("nested-runtime")
    except PackageNotFoundError:
        release = "unknown"
    return {"version": release, "backend": service.settings.backend, "durability": service.store.durability}
