"""Chat templates of checkpoints: Jinja programs, run in a sandbox that can reach nothing but the messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nested_runtime.errors import CheckpointError, RequestError

__all__ = ["ChatTemplate"]

MAX_SOURCE = 1 << 18


class ChatTemplate:
    """A compiled template. `tokens`: special tokens by their names in templates (`bos_token`, `eos_token`)."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"the chat template has {len(source)} characters, the limit is {MAX_SOURCE}")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
        self.source, self.tokens = source, dict(tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template is not valid Jinja: {error}") from None

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The conversation as text; RequestError when the template refuses it."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                **self.tokens,
            )
        except _Refused as error:
            raise RequestError(f"the model's chat template refuses this: {error}", param="messages") from None
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
            raise RequestError(
                f"the model's chat template fails on these messages: {type(error).__name__}: {error}", param="messages"
            ) from None


class _Refused(TemplateError):
    """A template called raise_exception."""


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _to_json(value: Any, indent: int | None = None, **_options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
