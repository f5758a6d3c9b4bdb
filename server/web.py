"""The web page: the files of clients/web, read once, at / and /web/, with headers that let it load nothing else.

They are public code without any data, so they ask for no key: the page asks for it and sends it with its own requests.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["routes"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def routes() -> list[Route]:
    """One route for each file: index.html is /, the others are under /web/."""
    found = [one for one in files("clients").joinpath("web").iterdir() if one.name.rpartition(".")[2] in TYPES]
    return [_route(one.name, one.read_bytes()) for one in sorted(found, key=lambda one: one.name)]


def _route(name: str, data: bytes) -> Route:
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    media_type = TYPES[name.rpartition(".")[2]]

    async def page(request: Request) -> Response:
        headers = {**HEADERS, "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=media_type)

    return Route("/" if name == "index.html" else f"/web/{name}", page, include_in_schema=False)
