"""Which of the messages sent has the memory already read?

OpenAI clients resend the whole conversation; others send only the newest question. Every version of a session remembers
where the conversation that wrote it stands, as a chain of digests:

    d_0 = constant,  d_i = sha256(d_{i-1} || role || content)        one link per message, replies included

`match` compares the chain of a request with those of the retained versions and answers with a `Match`: which version
the state comes from and how many of the messages it has already read.

What counts as "the same conversation" is the chain up to the first message that is not a system message, because many
clients put one system prompt before every question. A request without any reply in it carries no sign of being a
resend ("next", "next", "next" are three messages), so it is new unless the caller says `mode="resent"`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nested_runtime.errors import HistoryConflict, RequestError

__all__ = ["Match", "Message", "Mode", "Record", "Version", "digests", "match", "root_of"]

Message = Mapping[str, str]
"""`{"role": ..., "content": ...}`, as the tokenizer renders it."""

Mode = Literal["auto", "new", "resent"]


@dataclass(frozen=True)
class Record:
    """Where the conversation that wrote a version stands."""

    root: str  # digest after the first message that is not a system message: names the conversation
    chain: str  # digest after the last message, the reply included
    count: int  # messages in `chain`
    start: int  # version whose state the conversation began from


@dataclass(frozen=True)
class Version:
    """A retained version, as matching sees it."""

    number: int
    source: int  # version its state was computed from; 0 = fresh
    record: Record | None  # None: written by reset, learn, import


@dataclass(frozen=True)
class Match:
    """Start from the state of `version`, skip the first `num_read` messages."""

    version: int  # 0 = the fresh state
    num_read: int
    start: int  # Record.start of the version to be written
    how: Literal["new", "extended", "branched", "raw"]


def digests(messages: Iterable[Message], start: str = "nested-history-1") -> list[str]:
    """The chain after each message. Outer white space does not count: clients strip it from replies."""
    chain, last = [], start
    for message in messages:
        text = f"{last}\x00{message['role']}\x00{message['content'].strip()}"
        last = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        chain.append(last)
    return chain


def root_of(messages: Sequence[Message], chain: Sequence[str]) -> str:
    """Digest that names the conversation; empty messages have none."""
    for message, digest in zip(messages, chain, strict=True):
        if message["role"] != "system":
            return digest
    return chain[-1]


def match(messages: Sequence[Message], versions: Sequence[Version], head: int, mode: Mode = "auto") -> Match:
    """Find what `messages` add to the session whose retained versions are given and whose newest version is `head`."""
    new = Match(head, 0, head, "new")
    resent = mode == "resent" or any(m["role"] == "assistant" for m in messages)
    if mode == "new" or not resent:
        return new
    chain = digests(messages)
    root = root_of(messages, chain)
    by_number = {v.number: v for v in versions}
    lineage = list(_lineage(by_number, head))
    last = next((v for v in lineage if v.record and v.record.root == root), None)
    if last is None or last.record is None:
        return new
    if _reads(last.record, chain):
        if last.record.count == len(chain):
            raise RequestError("the last message was already answered and learned; add a message", param="messages")
        return Match(head, last.record.count, last.record.start, "extended")
    return _branch(last.record, chain, root, versions, lineage)


def _lineage(by_number: Mapping[int, Version], head: int) -> Iterable[Version]:
    """Versions whose tokens are in the head's state, newest first, as far back as they are kept."""
    number = head
    while number in by_number:
        yield by_number[number]
        number = by_number[number].source


def _reads(record: Record, chain: Sequence[str]) -> bool:
    return 0 < record.count <= len(chain) and chain[record.count - 1] == record.chain


def _branch(
    last: Record, chain: Sequence[str], root: str, versions: Sequence[Version], lineage: Sequence[Version]
) -> Match:
    """The version at the fork of an edited or regenerated conversation; HistoryConflict when it cannot be had."""
    points = [(last.start, 0)]
    same = [(v.number, v.record) for v in versions if v.record and v.record.root == root]
    points += [(number, record.count) for number, record in same if _reads(record, chain)]
    number, count = max(points, key=lambda point: (point[1], point[0]))
    if number != 0 and all(v.number != number for v in versions):
        raise HistoryConflict(
            f"the conversation was changed at message {count + 1}, but version {number}, where it forks, is no longer "
            "kept; send only the new messages, or reset or restore the session first"
        )
    foreign = [v.number for v in lineage if v.number > number and not (v.record and v.record.root == root)]
    if foreign:
        raise HistoryConflict(
            f"the conversation was changed at message {count + 1}; going back to version {number} would forget version "
            f"{foreign[0]}, which another conversation wrote; send only the new messages, or restore version {number}"
        )
    if count == len(chain):
        raise RequestError("the last message was already answered and learned; add a message", param="messages")
    return Match(number, count, last.start, "branched")
