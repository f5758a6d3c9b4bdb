"""Nested Runtime's engine, learning on: every token changes the session's memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.systems.base import BLOCKS, DIM, HEADS, VOCAB, Case, tokens
from nested_runtime.core import SamplingParams, Sequence
from nested_runtime.engine.engine import Engine
from nested_runtime.models.hope import Hope, HopeConfig

__all__ = ["Exact", "NestedRuntime", "hope", "start"]


def hope() -> Hope:
    """HOPE of the compared size; noise on every parameter, so that nothing is zero and cheap. Numbers that bfloat16
    holds, as those of a shipped checkpoint are."""
    torch.manual_seed(0)
    model = Hope(HopeConfig(VOCAB, DIM, BLOCKS, HEADS)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter)).copy_(parameter.bfloat16())
    return model


def start(engine: Engine, case: Case) -> None:
    """Submit the case's sessions with prompts of their own and read them."""
    params = SamplingParams(max_tokens=1 << 30, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(tokens(case.sessions, case.context).tolist()):
        engine.submit(Sequence(f"{case.name}-{number}", prompt, params))
    while engine.stats()["prompt_tokens"] < case.sessions * case.context:
        engine.step()


class Exact:
    """See `System`. Products in float32."""

    name = "nested-runtime-float32"

    def __init__(self) -> None:
        self._model = hope()
        self.num_parameters = sum(p.numel() for p in self._model.parameters())

    def prepare(self, case: Case) -> Callable[[], None]:
        """See `System`. A step is one step of the engine; a prefill ends with its first sampled token."""
        engine = Engine(self._model, capacity=case.sessions)
        if case.context:
            start(engine, case)

            def decode() -> None:
                if len(engine.step()) != case.sessions:
                    raise RuntimeError("a session gave no token")

            return decode
        prompt = tokens(1, case.num_tokens)[0].tolist()

        def prefill() -> None:
            engine.submit(Sequence("prefill", prompt, SamplingParams(max_tokens=1, temperature=0.0)))
            while engine.has_work:
                engine.step()

        return prefill


class NestedRuntime(Exact):
    """See `System`. Products in int8, as `nested-serve --quantize int8` has them."""

    name = "nested-runtime"

    def __init__(self) -> None:
        super().__init__()
        self._model.quantize()
