"""GET /health (the process), /ready (store and models), /metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from nested_runtime.errors import StoreError

from ..deps import ServiceDep

__all__ = ["router"]

router = APIRouter(tags=["health"])
PING_SECONDS = 2.0


@router.get("/health")
async def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(service: ServiceDep) -> JSONResponse:
    """Store and models can take work: 200, else 503 and why not."""
    problems: dict[str, Any] = {}
    if service.leaving or not service.ready:
        problems["server"] = "starting or shutting down"
    stopped = [m.id for m in service.runtime.models.values() if not m.backend.stats().get("accepting", True)]
    if stopped:
        problems["models"] = stopped
    try:
        await asyncio.wait_for(service.store.ping(), PING_SECONDS)
    except (StoreError, TimeoutError) as error:
        problems["store"] = str(error) or "no answer"
    return JSONResponse({"ready": not problems, **problems}, 503 if problems else 200)


@router.get("/metrics")
async def metrics(service: ServiceDep) -> Response:
    """Prometheus exposition."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
