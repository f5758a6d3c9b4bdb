"""Tokenizer and chat template of a checkpoint, as our tokenizers read them."""

from __future__ import annotations

from typing import Any

from nested_runtime.convert.source import Source
from nested_runtime.errors import CheckpointError
from nested_runtime.hub_tokenizer import HubTokenizer, backend_of
from nested_runtime.tokenizer import SPECIAL, Tokenizer

__all__ = ["read_tokenizer"]


def read_tokenizer(source: Source) -> Tokenizer:
    """Our own tokenizer where the checkpoint carries one of ours, else the checkpoint's with its chat template."""
    path = source.folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{path} is missing; save the checkpoint's tokenizer as a fast tokenizer")
    backend = backend_of(source.text("tokenizer.json"), path)
    if [backend.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL))):
        return Tokenizer(backend)
    settings = source.json("tokenizer_config.json", optional=True)
    eos = _token(settings.get("eos_token"))
    chat = {
        "template": _template(source, settings),
        "bos_token": _token(settings.get("bos_token")),
        "eos_token": eos,
        "end_tokens": _ends(source, backend.token_to_id(eos) if eos else None),
    }
    return HubTokenizer(backend, chat)


def _token(value: Any) -> str | None:
    """A token in either form of tokenizer_config.json."""
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"tokenizer_config.json: token {value!r} is not a string")
    return value


def _template(source: Source, settings: dict[str, Any]) -> str | None:
    if (source.folder / "chat_template.jinja").exists():
        return source.text("chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError("tokenizer_config.json: chat_template is neither a text nor a list with a default")
    return template


def _ends(source: Source, eos: int | None) -> list[int]:
    """End tokens, the tokenizer's own first: it is what closes a message in the template."""
    ends = [] if eos is None else [eos]
    for values in (source.json("generation_config.json", optional=True), source.config):
        named = values.get("eos_token_id")
        named = named if isinstance(named, list) else [named]
        ends += [token for token in named if type(token) is int and token not in ends]
    if not ends:
        raise CheckpointError(
            f"{source.folder}: no eos token in tokenizer_config.json, generation_config.json, config.json"
        )
    return ends
