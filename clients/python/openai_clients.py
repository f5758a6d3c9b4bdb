"""`openai(session="alice")`: a client of the `openai` package that talks to one session. The package is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .client import address, session_id
from .errors import ConfigError

if TYPE_CHECKING:
    from .bound_openai import AsyncOpenAI, OpenAI

__all__ = ["async_openai", "openai"]


def openai(
    session: str | None = None, *, base_url: str | None = None, api_key: str | None = None, **options: Any
) -> OpenAI:
    """An `openai.OpenAI` whose requests go to the memory `session`; None = memoryless.

    `base_url` and `api_key` default to NESTED_BASE_URL and NESTED_API_KEY; `options` are those of `openai.OpenAI`.
    """
    settings = _settings(session, base_url, api_key, options)
    try:
        from .bound_openai import OpenAI
    except ImportError as error:
        raise _absent(error) from None
    return OpenAI(**settings)


def async_openai(
    session: str | None = None, *, base_url: str | None = None, api_key: str | None = None, **options: Any
) -> AsyncOpenAI:
    """As `openai`, awaited."""
    settings = _settings(session, base_url, api_key, options)
    try:
        from .bound_openai import AsyncOpenAI
    except ImportError as error:
        raise _absent(error) from None
    return AsyncOpenAI(**settings)


def _settings(
    session: str | None, base_url: str | None, api_key: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    url, key = address(base_url, api_key)
    headers = dict(options.pop("default_headers", None) or {})
    if session is not None:
        headers["X-Session-ID"] = _header(session)
    return {"base_url": f"{url}/v1", "api_key": key or "none", "default_headers": headers, **options}


def _header(session: str) -> str:
    """The id as OpenAI clients send it: a header, which holds less than a path does."""
    if not all("!" <= character <= "~" for character in session_id(session)):
        raise ConfigError(
            f"session id {session[:40]!r} does not fit into a header: use visible ASCII without spaces, or Client"
        )
    return session


def _absent(error: ImportError) -> ConfigError:
    return ConfigError(f"this needs the openai package ({error}): pip install openai, or use Client, which does not")
