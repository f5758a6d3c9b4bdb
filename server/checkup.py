"""`nested-serve --check`: what would run here, as JSON, without serving. `nested doctor` shows it to people."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Literal, TypedDict

import torch

from nested_runtime.errors import ConfigError, NestedError
from nested_runtime.kernels.dispatch import packed_kernels
from nested_runtime.models import loading
from nested_runtime.store.base import StateStore
from nested_runtime.store.url import open_store

from .settings import Settings

__all__ = ["Finding", "checkup", "kernels_of", "report"]


class Finding(TypedDict):
    """One thing looked at."""

    check: str
    state: Literal["ok", "note", "fail"]
    detail: str


def report(settings: Settings) -> int:
    """Print the findings; exit status 1 when one of them keeps the server from serving."""
    findings = list(checkup(settings))
    sys.stdout.write(json.dumps(findings, ensure_ascii=False) + "\n")
    return int(any(finding["state"] == "fail" for finding in findings))


def checkup(settings: Settings) -> Iterator[Finding]:
    """Kernels, GPU, models and store of these settings."""
    yield from _kernels()
    yield _gpu()
    for name in settings.models:
        yield _model(name)
    yield _store(settings)


def kernels_of(device: str) -> str:
    """The kernels for float32 memories on a device type; ConfigError if NESTED_KERNELS forces impossible ones."""
    found = packed_kernels(device, torch.float32)
    return "reference" if found is None else found.name


def _kernels() -> Iterator[Finding]:
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        try:
            name = kernels_of(device)
        except ConfigError as error:
            yield Finding(check=f"kernels/{device}", state="fail", detail=str(error))
            continue
        slow = name == "reference"
        detail = f"{name} (torch {torch.__version__}, {torch.get_num_threads()} threads)"
        if slow:
            detail += "; right, but slow: pip install -e '.[serve]' brings numba"
        yield Finding(check=f"kernels/{device}", state="note" if slow else "ok", detail=detail)


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "CUDA finds no device"
        return Finding(check="gpu", state="note", detail=f"none: {why}; models run on the CPU")
    props = torch.cuda.get_device_properties(0)
    return Finding(check="gpu", state="ok", detail=f"{props.name}, {props.total_memory / 2**30:.0f} GiB")


def _model(name: str) -> Finding:
    try:
        loaded = loading.load(name)
    except NestedError as error:
        return Finding(check=f"model/{name}", state="fail", detail=str(error))
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    return Finding(
        check=f"model/{name}",
        state="ok",
        detail=f"{loaded.id}: {count / 1e6:.1f}M parameters, fingerprint {loaded.fingerprint[:12]}",
    )


def _store(settings: Settings) -> Finding:
    """Open it, ask it, close it. A default store that is not there yet is made by the first start, not by a look."""
    if settings.store is None and not settings.data_dir.expanduser().exists():
        return Finding(check="store", state="note", detail=f"{settings.data_dir} does not exist; the server makes it")
    try:
        store = open_store(settings.store_url, ttl=settings.session_ttl, limits=settings.limits)
        return Finding(check="store", state="ok", detail=asyncio.run(_asked(store)))
    except NestedError as error:
        return Finding(check="store", state="fail", detail=str(error))


async def _asked(store: StateStore) -> str:
    await store.open()
    try:
        await store.ping()
        usage = await store.usage()
        return (
            f"{type(store).__name__}: {usage.sessions} sessions, {usage.bytes:,} bytes; durability {store.durability}"
        )
    finally:
        await store.close()
