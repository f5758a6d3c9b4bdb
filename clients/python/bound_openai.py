"""The `openai` package bound to a session: its own client classes, which also name every request they may repeat.

They retry by themselves and send no idempotency key of their own accord; a turn that was answered into a cut connection
would then be taught twice. These send one per call, the same for each attempt of it.
"""

from __future__ import annotations

from typing import Any

import openai

__all__ = ["AsyncOpenAI", "OpenAI"]

_KEY = "Idempotency-Key"


class OpenAI(openai.OpenAI):
    """`openai.OpenAI` whose retries cannot teach a memory twice."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._idempotency_header = _KEY  # openai's own switch, off by default; tests/clients/test_openai.py guards it


class AsyncOpenAI(openai.AsyncOpenAI):
    """`openai.AsyncOpenAI` whose retries cannot teach a memory twice."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._idempotency_header = _KEY
