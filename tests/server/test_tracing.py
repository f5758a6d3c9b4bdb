"""Traces, as a collector receives them."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from nested_runtime.errors import ConfigError
from server.tracing import tracing_to

Chat = Callable[..., httpx.Response]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Keeps the spans it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.raw = b""
        super().__init__(("127.0.0.1", 0), Receiver)


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        message = ExportTraceServiceRequest.FromString(body)
        self.server.raw += body
        scopes = (scope for resource in message.resource_spans for scope in resource.scope_spans)
        self.server.spans += [span for scope in scopes for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def test_a_request_is_a_span(settings: Any, serve: Any, chat: Chat, collector: Collector) -> None:
    url = f"http://127.0.0.1:{collector.server_port}"
    with serve(settings(otlp_endpoint=url)) as server, server.client() as client:
        traced = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
        assert chat(client, "a private matter", session="a-secret-name", stream=True, headers=traced).status_code == 200
        assert chat(client, "x" * 3000, session="a-secret-name").status_code == 400
    first = next(span for span in collector.spans if attributes(span).get("nested.request") == "mine")
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert first.name == "POST /v1/chat/completions" or first.name == "POST /chat/completions"
    said = attributes(first)
    assert (said["http.request.method"], said["http.response.status_code"]) == ("POST", 200)
    assert len(said["nested.session"]) == len(said["nested.tenant"]) == 12
    assert [one.name for one in first.events] == ["first token"]
    inside = [span for span in collector.spans if span.parent_span_id == first.span_id]
    assert [span.name for span in inside] == ["memory.commit"]
    assert first.start_time_unix_nano < inside[0].start_time_unix_nano < inside[0].end_time_unix_nano
    assert 400 in [attributes(span).get("http.response.status_code") for span in collector.spans]
    assert b"private" not in collector.raw
    assert b"a-secret-name" not in collector.raw


def test_a_collector_that_is_not_there_is_in_nobodys_way(settings: Any, serve: Any, chat: Chat) -> None:
    with serve(settings(otlp_endpoint="http://127.0.0.1:9")) as server, server.client() as client:
        assert chat(client, "hello", session="s").status_code == 200


def test_an_impossible_endpoint() -> None:
    with pytest.raises(ConfigError, match="collector:4317"):
        tracing_to("collector:4317")
