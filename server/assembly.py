"""From settings to a Service: models loaded, engines built, store chosen. Fails before anything listens."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from nested_runtime.backends.native import NativeBackend
from nested_runtime.engine.engine import Engine
from nested_runtime.engine.runner import state_specs
from nested_runtime.errors import ConfigError
from nested_runtime.models import loading
from nested_runtime.sessions import Consolidator, Runtime, ServedModel, SessionManager, Vault
from nested_runtime.store.base import StateStore
from nested_runtime.store.url import open_store

from .answers import AnswerCache
from .auth import Keys
from .deps import Service
from .metrics import Metrics
from .settings import Settings
from .tracing import tracing_to

__all__ = ["assemble", "build_service", "serve_model"]


def assemble(settings: Settings) -> Service:
    """Everything the settings name, not started yet. ConfigError or CheckpointError says what is wrong."""
    keys, admin_keys = Keys.load(settings.api_key_file), Keys.load(settings.admin_key_file)
    int8 = settings.engine.quantize == "int8"
    if int8 and settings.backend != "native":
        raise ConfigError("--quantize is of the native backend; leave one of --quantize and --backend out")
    models = [serve_model(loading.load(name, int8=int8), settings) for name in settings.models]
    if settings.store is None:
        try:
            settings.data_dir.expanduser().mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--data-dir {settings.data_dir} cannot be made: {error}") from None
    store = open_store(settings.store_url, ttl=settings.session_ttl, limits=settings.limits)
    return build_service(settings, store, models, keys=keys, admin_keys=admin_keys)


def serve_model(loaded: loading.LoadedModel, settings: Settings) -> ServedModel:
    """A loaded model with its engine."""
    return _on_vllm(loaded, settings) if settings.backend == "vllm" else _on_our_engine(loaded, settings)


def _on_vllm(loaded: loading.LoadedModel, settings: Settings) -> ServedModel:
    try:
        from nested_runtime.backends.vllm.backend import VllmBackend, VllmOptions
    except ImportError as error:
        raise ConfigError(
            f"--backend vllm needs vLLM 0.32 beside this package ({error}); see docs/scaling.md, or use native"
        ) from None
    config = settings.engine
    specs = state_specs(loaded.model)
    backend = VllmBackend(
        loaded.folder,
        model_id=loaded.id,
        fingerprint=loaded.fingerprint,
        model=loaded.model,
        end_tokens=loaded.tokenizer.end_ids,
        options=VllmOptions(config.slots, config.queue, config.max_batch_tokens, config.max_context),
    )
    return ServedModel(loaded.id, backend, loaded.tokenizer, specs, loaded.model.levels, loaded.model.memory)


def _on_our_engine(loaded: loading.LoadedModel, settings: Settings) -> ServedModel:
    config = settings.engine
    engine = Engine(
        loaded.model,
        capacity=config.slots,
        end_tokens=loaded.tokenizer.end_ids,
        max_batch_tokens=config.max_batch_tokens,
        max_queue=config.queue,
        prefix_cache_bytes=config.prefix_cache_bytes,
        kv_bytes=config.kv_bytes,
        update_share=config.update_share,
    )
    backend = NativeBackend(
        engine,
        model_id=loaded.id,
        fingerprint=loaded.fingerprint,
        max_context=config.max_context,
        max_resident=0,  # sessions keep their own, see sessions/vault.py
        num_threads=config.threads or torch.get_num_threads(),
    )
    return ServedModel(loaded.id, backend, loaded.tokenizer, engine.specs, loaded.model.levels, loaded.model.memory)


def build_service(
    settings: Settings,
    store: StateStore,
    models: Iterable[ServedModel],
    *,
    keys: Keys | None = None,
    admin_keys: Keys | None = None,
) -> Service:
    """A service over a store and models that are at hand."""
    models = list(models)
    names = [model.id for model in models]
    if len(set(names)) != len(names):
        raise ConfigError(f"two models have the same name: {', '.join(sorted(names))}; give one `name` in config.json")

    def stats() -> list[tuple[str, dict[str, Any]]]:
        return [(model.id, model.backend.stats()) for model in models]

    metrics = Metrics(stats, lambda: (len(vault.residents), vault.residents.num_bytes))
    tracing = tracing_to(settings.otlp_endpoint)

    def observe(name: str, value: float) -> None:
        metrics.observe(name, value)
        tracing.measured(name, value)

    for model in models:
        if isinstance(model.backend, NativeBackend):
            model.backend.observe = metrics.observe
    vault = Vault(store, settings.sessions, observe, [model.backend for model in models])
    runtime = Runtime(vault, models)
    return Service(
        settings=settings,
        store=store,
        vault=vault,
        runtime=runtime,
        manager=SessionManager(vault, runtime.model),
        consolidator=Consolidator(vault, runtime.model),
        metrics=metrics,
        answers=AnswerCache(),
        keys=keys or Keys(),
        admin_keys=admin_keys or Keys(),
        tracing=tracing,
        started=int(time.time()),
    )
