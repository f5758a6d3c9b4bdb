"""schemathesis over /openapi.json, every check: no 5xx, no undocumented status, no way around the keys.

100 examples per operation in `make test-compat`, 5 in `make test`. The server is its own: it is drained and erased.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import ADMIN_KEY, HERE, KEY, Run, Server, installed

PARTS = {
    "generating": r"^/v1/(chat/completions|completions|responses)",
    "sessions": r"^/v1/sessions",
    "rest": r"^/(?!v1/sessions|v1/chat|v1/completions|v1/responses|admin/drain)",
    "drain": r"^/admin/drain",  # by itself: it makes the server refuse turns
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", PARTS)
def test_the_document_holds(serve: Callable[..., Any], run: Run, tmp_path: Path, part: str, is_full: bool) -> None:
    st = installed("schemathesis", "st")
    config = tmp_path / "schemathesis.toml"
    template = (HERE / "schemathesis.toml").read_text()
    config.write_text(template.replace("@KEY@", KEY).replace("@ADMIN@", ADMIN_KEY))
    examples = "100" if is_full else "5"
    with serve("--max-context", "64") as server:  # what is asked for is random, and so would be how long it takes
        document = tmp_path / "openapi.json"
        with server.client() as client:
            document.write_bytes(client.get("/openapi.json").content)
        run(
            *(st, "--config-file", config, "run", document, "--url", server.url, "--checks", "all"),
            *("--include-path-regex", PARTS[part], "--max-examples", examples, "--seed", "1"),
            *("--continue-on-failure", "--no-color"),
            timeout=3500 if is_full else 280,
        )
        still_there(server)


def still_there(server: Server) -> None:
    with server.client(None) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
