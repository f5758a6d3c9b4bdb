"""One vLLM engine for all tests, and our own engine with the same model. Without vLLM everything here is skipped."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nested_runtime.backends.native import NativeBackend
from nested_runtime.core import SamplingParams, Sequence, TokenEvent
from nested_runtime.engine.engine import Engine
from nested_runtime.models import loading

MODEL = "hope-nano"
BATCH_TOKENS = 128  # long prompts are read in several chunks


@dataclass
class Reply:
    """What a sequence gave."""

    tokens: list[int]
    last: TokenEvent
    events: list[TokenEvent]


class Engines:
    """A backend on an event loop of its own."""

    def __init__(self, backend: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.backend, self._loop = backend, loop

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(300)

    def run(self, *sequences: Sequence) -> list[Reply]:
        """Run sequences side by side."""

        async def one(sequence: Sequence) -> Reply:
            events = [event async for event in self.backend.submit(sequence)]
            return Reply([e.token for e in events if e.token is not None], events[-1], events)

        async def every() -> list[Reply]:
            return await asyncio.gather(*map(one, sequences))

        replies: list[Reply] = self.wait(every())
        for reply in replies:
            if reply.last.error is not None:
                raise reply.last.error
        return replies


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever, daemon=True)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()
    made.close()


@pytest.fixture(scope="session")
def loaded() -> loading.LoadedModel:
    return loading.load(MODEL)


@pytest.fixture(scope="session")
def native(loaded: loading.LoadedModel, loop: asyncio.AbstractEventLoop) -> Iterator[Engines]:
    engine = Engine(loaded.model, capacity=16, end_tokens=loaded.tokenizer.end_ids)
    yield from started(NativeBackend(engine, model_id=loaded.id, fingerprint=loaded.fingerprint), loop)


@pytest.fixture(scope="session")
def vllm(loaded: loading.LoadedModel, loop: asyncio.AbstractEventLoop) -> Iterator[Engines]:
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment (make test-vllm makes one)")
    from nested_runtime.backends.vllm.backend import VllmBackend, VllmOptions

    options = VllmOptions(slots=8, max_batch_tokens=BATCH_TOKENS, max_context=2048)
    made = VllmBackend(
        loaded.folder, model_id=loaded.id, fingerprint=loaded.fingerprint, model=loaded.model,
        end_tokens=loaded.tokenizer.end_ids, options=options,
    )  # fmt: skip
    yield from started(made, loop)


def started(backend: Any, loop: asyncio.AbstractEventLoop) -> Iterator[Engines]:
    made = Engines(backend, loop)
    made.wait(backend.start())
    yield made
    made.wait(backend.drain(5.0))


@pytest.fixture(scope="session")
def greedy() -> Callable[..., SamplingParams]:
    return _greedy


@pytest.fixture(scope="session")
def same_state() -> Callable[..., None]:
    return _same_state


def _greedy(max_tokens: int = 12, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **fields)


def _same_state(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal within the fp32 tolerance of docs/scaling.md: the two engines batch their products differently."""
    assert list(found) == list(expected)  # the codec depends on the order
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
