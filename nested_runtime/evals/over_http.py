"""A running server: every telling is a request of its own, every question travels alone."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import httpx

from nested_runtime.errors import ConfigError, NestedError
from nested_runtime.evals.exam import Exam
from nested_runtime.evals.subject import MAX_TOKENS, Progress, Transcript
from nested_runtime.tokenizer import END, SPECIAL

__all__ = ["OverHttp", "connect"]

END_ID = SPECIAL.index(END)
EXCHANGES = 100  # of small talk in one request
TEXTS = 1000  # tokenized in one request
ATTEMPTS = 8


@contextmanager
def connect(
    base_url: str, *, api_key: str | None = None, model: str | None = None, connections: int = 16
) -> Iterator[OverHttp]:
    """A subject behind a URL, with or without /v1. `model`: an id, None = the server's first."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=connections)
    url = base_url.rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=url, headers=headers, timeout=600.0, limits=limits) as http:
        yield OverHttp(http, model, connections)


class OverHttp:
    """Subject over a server's API, see `connect`; its sessions are deleted afterwards."""

    def __init__(self, http: httpx.Client, model: str | None, connections: int) -> None:
        self.where = str(http.base_url).rstrip("/")
        self._http, self._connections = http, connections
        cards = {card["id"]: card for card in self._call("GET", "/v1/models")["data"]}
        self.name = model or next(iter(cards))
        if self.name not in cards:
            raise ConfigError(f"--model {model!r} is not served at {self.where}; it serves: {', '.join(cards)}")
        self.fingerprint = str(cards[self.name].get("fingerprint", ""))

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """See `Subject.lengths`."""
        sizes: list[int] = []
        for start in range(0, len(texts), TEXTS):
            messages = [_message("user", text) for text in texts[start : start + TEXTS]]
            body = {"model": self.name, "messages": messages, "add_generation_prompt": False}
            begin = 0
            tokens = self._call("POST", "/tokenize", json=body)["tokens"]
            for end in (place for place, token in enumerate(tokens) if token == END_ID):
                sizes.append(end - begin - 1)
                begin = end + 1
        return sizes

    def sit(self, exams: Sequence[Exam], *, independent: bool, progress: Progress) -> list[Transcript]:
        """See `Subject.sit`."""
        with ThreadPoolExecutor(self._connections) as pool:
            visits = [pool.submit(self._visit, exam, independent) for exam in exams]
            try:
                for done, visit in enumerate(as_completed(visits), 1):
                    visit.result()
                    progress(done, len(visits))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [visit.result() for visit in visits]

    def _visit(self, exam: Exam, independent: bool) -> Transcript:
        session = f"eval-{uuid.uuid4().hex}"
        learn = "off" if independent else "all"
        try:
            replies = [self._say(session, text, "all") for text in exam.tellings]
            for start in range(0, len(exam.small_talk), EXCHANGES):
                self._read(session, exam.small_talk[start : start + EXCHANGES])
            answers = [self._say(session, question.text, learn) for question in exam.questions]
            self._call("POST", f"/v1/sessions/{session}/reset")
            controls = [self._say(session, question.text, "off") for question in exam.questions]
        finally:
            self._call("DELETE", f"/v1/sessions/{session}", may_be_absent=True)
        return Transcript(tuple(replies), tuple(answers), tuple(controls), (None,) * len(answers))

    def _say(self, session: str, text: str, learn: str) -> str:
        body = {
            "model": self.name,
            "messages": [_message("user", text)],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "memory": {"learn": learn},
        }
        headers = {"X-Session-ID": session}
        if learn == "all":
            headers["Idempotency-Key"] = uuid.uuid4().hex  # a retry must not teach twice
        answer = self._call("POST", "/v1/chat/completions", json=body, headers=headers)
        return str(answer["choices"][0]["message"]["content"])

    def _read(self, session: str, exchanges: Sequence[tuple[str, str]]) -> None:
        messages = [_message(*m) for user, assistant in exchanges for m in (("user", user), ("assistant", assistant))]
        self._call("POST", f"/v1/sessions/{session}/learn", json={"model": self.name, "messages": messages})

    def _call(
        self, method: str, path: str, *, json: Any = None, headers: Mapping[str, str] | None = None,
        may_be_absent: bool = False,
    ) -> Any:  # fmt: skip
        """The answer's JSON; waits and tries again while the server is busy."""
        for attempt in range(ATTEMPTS):
            try:
                response = self._http.request(method, path, json=json, headers=headers)
            except httpx.TransportError as error:
                raise ConfigError(f"{method} {self.where}{path}: {error}; is nested-serve running there?") from None
            if response.status_code not in (429, 503) or attempt == ATTEMPTS - 1:
                break
            time.sleep(min(10.0, float(response.headers.get("Retry-After", 1.0))))
        if response.is_success or (may_be_absent and response.status_code == 404):
            return response.json()
        raise NestedError(f"{method} {self.where}{path}: HTTP {response.status_code}: {response.text[:500]}")


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
