"""The ASGI application: routes, middleware, and the life of store and engines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from nested_runtime.errors import NestedError
from nested_runtime.models.replay import Consolidation

from . import errors, openapi, web
from .deps import Service
from .middleware import OPEN, Gate
from .routes import admin, chat, completions, health, memory, models, responses

__all__ = ["create_app", "running"]

logger = logging.getLogger("nested.server")
V1 = (chat.router, completions.router, responses.router, models.router, memory.router)


def create_app(service: Service) -> FastAPI:
    """The application over a service. Starting it opens the store and starts the engines."""
    app = FastAPI(
        title="Nested Runtime",
        version="1",
        description="OpenAI's API with a memory per session: send X-Session-ID.",
        root_path=service.settings.root_path,
        lifespan=_lifespan,
        responses={400: {"model": errors.ErrorBody}},  # the others: openapi.py
    )
    app.state.service = service
    for router in V1:
        app.include_router(router, prefix="/v1")
        app.include_router(router, include_in_schema=False)
    for router in (models.root_router, health.router, admin.router):
        app.include_router(router)
    pages = web.routes() if service.settings.web else []
    app.routes.extend(pages)
    errors.install(app)
    openapi.install(app, service)
    app.add_middleware(
        Gate,
        keys=service.keys,
        admin_keys=service.admin_keys,
        open_paths=OPEN | {page.path for page in pages},
        max_body_bytes=service.settings.max_body_bytes,
        max_in_flight=service.settings.requests_in_flight,
        log_ids=service.settings.log_ids,
        observe=lambda route, status: service.metrics.requests.labels(route, str(status)).inc(),
        tracing=service.tracing,
    )
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with running(app.state.service):
        yield


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[None]:
    """The store open and the engines started; at the end turns are drained and everything is closed."""
    await service.store.open()
    try:
        for model in service.runtime.models.values():
            await model.backend.start()
        chores = {asyncio.create_task(_sweep(service))}
        if service.settings.sessions.consolidate_after:
            chores.add(asyncio.create_task(_rest(service)))
        service.ready = True
        try:
            yield
        finally:
            service.ready = False
            for chore in chores:
                chore.cancel()
            await asyncio.wait(chores)
    finally:
        deadline = service.settings.drain_seconds
        await asyncio.gather(*(model.backend.drain(deadline) for model in service.runtime.models.values()))
        await service.store.close()
        await asyncio.to_thread(service.tracing.close)


async def _sweep(service: Service) -> None:
    """Now and then: expired sessions leave the store, and sessions deleted elsewhere leave memory."""
    while True:
        await asyncio.sleep(service.settings.sweep_seconds)
        try:
            await service.store.sweep()
            await service.vault.forget_deleted()
        except NestedError as error:
            logger.warning("sweep skipped: %s", error)


async def _rest(service: Service) -> None:
    """While there is nothing else to do: sessions that have been idle for long enough consolidate."""
    config = service.settings.sessions
    wanted = Consolidation(decay=config.consolidate_decay)
    while True:
        await asyncio.sleep(min(config.consolidate_after, service.settings.sweep_seconds))
        try:
            await service.consolidator.rest(config.consolidate_after, wanted)
        except NestedError as error:
            logger.warning("consolidation given up: %s", error)
