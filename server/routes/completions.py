"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nested_runtime.errors import RequestError
from nested_runtime.sessions import Turn

from ..deps import CallerDep, Expected, ServiceDep, session_key
from ..exchange import Exchange
from ..schemas.common import known_but_unsupported
from ..schemas.completions import CompletionReply, CompletionRequest

__all__ = ["router"]

router = APIRouter(tags=["completions"])
DEFAULT_TOKENS = 16  # OpenAI's


@router.post("/completions")
async def create_completion(
    request: Request, body: CompletionRequest, service: ServiceDep, caller: CallerDep, expected: Expected
) -> Response:
    """Continue raw text or tokens: no chat template. A session's memory reads them as they are."""
    known_but_unsupported(body)
    model = service.model(body.model)
    session = session_key(request, body.session_id)
    count, prompts = body.n or 1, body.prompts(model.tokenizer)
    if session is not None and count * len(prompts) > 1:
        raise RequestError("a turn of a session has one prompt and one answer; send n=1 and one prompt", param="n")
    if body.scores:
        body.memory = body.memory.model_copy(update={"learn": "off"})
    options = body.stream_options
    reply = CompletionReply(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model.id,
        tokenizer=model.tokenizer,
        prompts=prompts,
        count=count,
        echo=bool(body.echo),
        logprobs=body.logprobs,
        include_usage=bool(options and options.include_usage),
    )
    tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    turns = []
    for index in range(count * len(prompts)):
        place, choice = divmod(index, count)
        params = body.sampling(tokens, body.logprobs, choice)
        if body.scores:
            params = replace(params, prompt_logprobs=body.logprobs)
        turns.append(
            Turn(
                id=f"{reply.id}-{index}",
                model=model.id,
                params=params,
                prompt=prompts[place].tokens,
                session=session,
                learn=body.memory.learn,
                expect=expected,
                scope=caller.tenant,
                fork_of=f"{reply.id}-{place * count}" if choice else None,
            )
        )
    return await Exchange(service, caller, request, body, session, reply.body, reply).answer(turns)
