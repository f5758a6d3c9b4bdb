"""The words of a turn: what is asked (`Turn`), what comes back while it runs (`Started`, `Delta`, `Finished`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from nested_runtime.core import SamplingParams, TokenLogprobs
from nested_runtime.sessions.history import Message, Mode
from nested_runtime.store.base import SessionKey

__all__ = ["Answer", "Delta", "Finished", "Learn", "Report", "Started", "Turn", "TurnEvent"]

Learn = Literal["all", "prompt", "off"]
"""What is committed: the state after the reply, the state after the prompt, or nothing.

A recurrent model cannot read without its state moving, so this says which state is kept, not what is read.
"""


@dataclass(frozen=True)
class Answer:
    """Idempotency: what to store, in the same atomic commit as the memory, under the caller's key.

    attempt   None = the caller gave the key. A number = he gave none, but counts his automatic retries (the OpenAI
              clients do): the answer is kept as that of the version it makes, and an attempt after the first gets it
              again if nothing has changed the session since
    """

    key: str
    body_digest: str
    render: Callable[[Finished], bytes]
    attempt: int | None = None


@dataclass(frozen=True)
class Turn:
    """One request to a model. Exactly one of `messages` (chat template) and `prompt` (raw tokens) is given.

    session   None = memoryless: no store is touched
    expect    If-Match: the version the caller believes is the head (0 = no session yet)
    base      version to continue from, whatever the head is (previous_response_id); None = found by history
    scope     whose prefix cache a memoryless request may share (the tenant); None = nobody's
    shorten   max_tokens is our default: use fewer if the context is short of room
    fork_of   id of a turn submitted before with the same prompt: its prefill is shared (n > 1)
    """

    id: str
    model: str
    params: SamplingParams
    messages: tuple[Message, ...] | None = None
    prompt: tuple[int, ...] | None = None
    session: SessionKey | None = None
    learn: Learn = "all"
    history: Mode = "auto"
    expect: int | None = None
    answer: Answer | None = None
    base: int | None = None
    scope: str | None = None
    shorten: bool = False
    fork_of: str | None = None


@dataclass(frozen=True)
class Report:
    """What became of the session.

    updates   chunks of this turn after which its levels learned
    refused   chunks after which they would have diverged: the levels stayed as they were, the session serves on
    """

    id: str
    version: int
    learned_tokens: int
    digest: str
    durability: str
    history: str  # "new", "extended", "branched" or "raw": how the messages related to the memory
    updates: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Started:
    """The turn is admitted: everything that can be refused was checked."""

    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """Text that became certain, and the tokens sampled since the last Delta (possibly one of the two only)."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The turn is over and, if it learns, committed. `cached_tokens` of the prompt were not read again."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    session: Report | None = None
    replayed: bytes | None = field(default=None, repr=False)  # the stored answer of an earlier request with this key


TurnEvent = Started | Delta | Finished
